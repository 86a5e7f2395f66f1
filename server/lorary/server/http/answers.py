"""What OpenAI's two kinds of answer look like: whole, and in chunks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from lorary.server.http.tools import told_calls, told_chunks
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    Positions = Sequence[pb.PositionLogprobs]

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}

_LOWEST = -9999.0
"""What a probability of zero is told as; JSON has no infinity."""


class Pieces:
    """The text of tokens, each read once.

    Args:
        decode: texts of token ids, one each; may wait for another thread.
    """

    def __init__(self, decode: Callable[[Sequence[int]], Awaitable[list[str]]]) -> None:
        self._decode = decode
        self._known: dict[int, str] = {}  # never larger than the vocabulary

    async def of(self, positions: Positions) -> Mapping[int, str]:
        """Return texts by id, those of every token that ``positions`` name among them."""
        wanted = {pair.token_id for p in positions for pair in (p.chosen, *p.top)}
        missing = sorted(wanted - self._known.keys())
        if missing:
            self._known.update(zip(missing, await self._decode(missing), strict=True))
        return self._known


class Shape(Protocol):
    """One kind of answer."""

    name: str
    chunk_name: str
    id_prefix: str

    def opening(self) -> dict[str, Any] | None:
        """Return what the first chunk of an answer says, if there is one before its text."""
        ...

    def piece(self, text: str, calls: Sequence[pb.ToolCallChunk] = ()) -> dict[str, Any]:
        """Return what a chunk says."""
        ...

    def whole(self, text: str, calls: Sequence[pb.ToolCall] = ()) -> dict[str, Any]:
        """Return what a whole answer says."""
        ...

    def logprobs(
        self,
        positions: Positions,
        texts: Mapping[int, str],
        *,
        offset: int,
        starts_prompt: bool = False,
    ) -> dict[str, Any]:
        """Return log probabilities; the first token's text begins at ``offset``.

        The first token of a prompt has none, for nothing stands before it.
        """
        ...


class ChatShape:
    """``/v1/chat/completions``."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def opening(self) -> dict[str, Any] | None:
        """Return the role, which comes first and alone."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str, calls: Sequence[pb.ToolCallChunk] = ()) -> dict[str, Any]:
        """Return a delta."""
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = told_chunks(calls)
        return {"delta": delta}

    def whole(self, text: str, calls: Sequence[pb.ToolCall] = ()) -> dict[str, Any]:
        """Return a message."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": told_calls(calls)}
        return {"message": message}

    def logprobs(
        self,
        positions: Positions,
        texts: Mapping[int, str],
        *,
        offset: int,
        starts_prompt: bool = False,
    ) -> dict[str, Any]:
        """Return one entry a token."""
        content = [
            _entry(p.chosen, texts) | {"top_logprobs": [_entry(pair, texts) for pair in p.top]}
            for p in positions
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """``/v1/completions``."""

    name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def opening(self) -> dict[str, Any] | None:
        """Return nothing: text comes first."""
        return None

    def piece(self, text: str, calls: Sequence[pb.ToolCallChunk] = ()) -> dict[str, Any]:
        """Return a text; prompts call no tools."""
        return {"text": text}

    def whole(self, text: str, calls: Sequence[pb.ToolCall] = ()) -> dict[str, Any]:
        """Return the text."""
        return {"text": text}

    def logprobs(
        self,
        positions: Positions,
        texts: Mapping[int, str],
        *,
        offset: int,
        starts_prompt: bool = False,
    ) -> dict[str, Any]:
        """Return one list a column, as the older of the two APIs has it."""
        tokens = [texts[p.chosen.token_id] for p in positions]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [
                None if i == 0 and starts_prompt else _finite(p.chosen.logprob)
                for i, p in enumerate(positions)
            ],
            "top_logprobs": [
                None
                if i == 0 and starts_prompt
                else {texts[pair.token_id]: _finite(pair.logprob) for pair in (*p.top, p.chosen)}
                for i, p in enumerate(positions)
            ],
            "text_offset": offsets,
        }


def usage(completes: Iterable[pb.GenerateComplete]) -> dict[str, Any]:
    """Return the counts of a call; a prompt counts once, however many answers it has.

    ``completes`` holds one event for each prompt and answer, in the order of prompts.
    """
    prompts: dict[int, pb.Usage] = {}
    generated = 0
    for place, complete in enumerate(completes):
        generated += complete.usage.completion_tokens
        if complete.index == 0:
            prompts[place] = complete.usage
    read = sum(one.prompt_tokens for one in prompts.values())
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(one.cached_tokens for one in prompts.values())
        },
    }


def receipt(message: pb.Receipt) -> dict[str, Any]:
    """Return the proof of what answered, as the ``lorary`` member of an answer."""
    times = message.timings
    return {
        "adapter": message.name,
        "version": message.version,
        "digest": message.digest,
        "ref": message.ref,
        "base_fingerprint": message.base_fingerprint,
        "quantization": message.quantization,
        "request_id": message.request_id,
        "execution": pb.Execution.Name(message.execution).removeprefix("EXECUTION_").lower(),
        "queue_ms": times.queue_ns / 1e6,
        "adapter_load_ms": times.adapter_load_ns / 1e6,
        "prefill_ms": times.prefill_ns / 1e6,
        "decode_ms": times.decode_ns / 1e6,
    }


def _entry(pair: pb.TokenLogprob, texts: Mapping[int, str]) -> dict[str, Any]:
    text = texts[pair.token_id]
    # A token that holds part of a character has no text of its own.
    exact = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": _finite(pair.logprob), "bytes": exact}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
