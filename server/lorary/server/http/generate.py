"""/v1/chat/completions and /v1/completions: run what a body asks for, and tell it as OpenAI does."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorary.server.caller import PartOfCall
from lorary.server.current_call import request_id
from lorary.server.http import answers
from lorary.server.http.requests import read_chat, read_completion
from lorary.server.together import together
from lorary.server.tracing.span import current_span
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from lorary.server.answers import ServerFacts
    from lorary.server.http.answers import Pieces, Shape
    from lorary.server.http.call import HttpCall
    from lorary.server.http.requests import Ask
    from lorary.server.service import InferenceService
    from lorary.server.targets import Prompts

    OnEvent = Callable[[int, pb.GenerateResponse], Awaitable[None]]


class Generation:
    """The two endpoints that generate.

    Args:
        service: the data plane, which admits, checks, runs and measures every call.
        prompts: for the text of tokens.
        pieces: likewise, remembered.
        facts: of the server.
    """

    def __init__(
        self, service: InferenceService, prompts: Prompts, pieces: Pieces, facts: ServerFacts
    ) -> None:
        self._service = service
        self._prompts = prompts
        self._pieces = pieces
        self._facts = facts

    async def chat(self, call: HttpCall) -> None:
        """Answer ``POST /v1/chat/completions``."""
        await self._run(call, read_chat(call.members, self._facts.base), answers.ChatShape())

    async def completion(self, call: HttpCall) -> None:
        """Answer ``POST /v1/completions``."""
        ask = read_completion(call.members, self._facts.base)
        await self._run(call, ask, answers.CompletionShape())

    async def _run(self, call: HttpCall, ask: Ask, shape: Shape) -> None:
        kind = _Stream if ask.is_stream else _Whole
        echoes = await self._echoes(ask)
        telling = kind(call, ask, shape, self._pieces, echoes, self._common(ask, shape))
        if ask.is_stream:
            if (span := current_span()) is not None:
                span.will_stream()
            keeper = asyncio.ensure_future(call.keep_alive())
            try:
                await self._generate(call, ask, telling.on_event)
            finally:
                keeper.cancel()
        else:
            await self._generate(call, ask, telling.on_event)
        await telling.finish()

    async def _generate(self, call: HttpCall, ask: Ask, on_event: OnEvent) -> None:
        """Run every prompt as a call of its own, side by side; the first error ends them all."""
        if len(ask.requests) == 1:
            await self._service.Generate(ask.requests[0], _Prompt(call, 0, on_event))
            return
        await together(
            self._service.Generate(request, _Prompt(call, place, on_event))
            for place, request in enumerate(ask.requests)
        )

    def _common(self, ask: Ask, shape: Shape) -> dict[str, Any]:
        """Return what every object of one answer says."""
        return {
            "id": shape.id_prefix + request_id(),
            "object": shape.chunk_name if ask.is_stream else shape.name,
            "created": int(time.time()),
            "model": ask.model,
            "system_fingerprint": self._facts.base_fingerprint[:19],
        }

    async def _echoes(self, ask: Ask) -> list[str]:
        """Return the text of every prompt, where it is to stand before its answers."""
        if not ask.is_echo:
            return [""] * len(ask.requests)
        return [
            await self._prompts.text(request.input.token_ids.ids)
            if request.input.WhichOneof("input") == "token_ids"
            else request.input.prompt
            for request in ask.requests
        ]


@dataclass(slots=True)
class _Prompt(PartOfCall):
    """One prompt of a body, as the service's caller."""

    place: int
    on_event: OnEvent

    async def write(self, message: pb.GenerateResponse, /) -> None:
        await self.on_event(self.place, message)


@dataclass(slots=True)
class _Answer:
    """One of the answers, as far as it has come."""

    offset: int
    logprobs: list[pb.PositionLogprobs] = field(default_factory=list)
    is_open: bool = False
    complete: pb.GenerateComplete | None = None


class _Telling:
    """What both ways of answering keep."""

    def __init__(
        self,
        call: HttpCall,
        ask: Ask,
        shape: Shape,
        pieces: Pieces,
        echoes: Sequence[str],
        common: Mapping[str, Any],
    ) -> None:
        self._call, self._ask, self._shape, self._pieces = call, ask, shape, pieces
        self._echoes = echoes
        self._common = common
        self._answers = [_Answer(len(echo)) for echo in echoes for _ in range(ask.num_answers)]

    def _index(self, place: int, index: int) -> int:
        return place * self._ask.num_answers + index

    async def _logprobs(
        self, positions: Sequence[pb.PositionLogprobs], offset: int, *, has_prompt: bool = False
    ) -> dict[str, Any] | None:
        if not self._ask.has_logprobs:
            return None
        texts = await self._pieces.of(positions)
        return self._shape.logprobs(positions, texts, offset=offset, starts_prompt=has_prompt)

    def _completes(self) -> list[pb.GenerateComplete]:
        return [a.complete for a in self._answers if a.complete is not None]


class _Whole(_Telling):
    """Collects everything, and answers once."""

    async def on_event(self, place: int, event: pb.GenerateResponse) -> None:
        if event.HasField("chunk"):
            index = self._index(place, event.chunk.index)
            self._answers[index].logprobs.extend(event.chunk.logprobs)
        else:
            index = self._index(place, event.complete.index)
            self._answers[index].complete = event.complete

    async def finish(self) -> None:
        completes = self._completes()
        choices = []
        for index, (answer, complete) in enumerate(zip(self._answers, completes, strict=True)):
            if self._ask.is_silent:
                answer.logprobs.clear()
                complete = _unsaid(complete)
            echo = self._echoes[index // self._ask.num_answers]
            positions = [*complete.prompt_logprobs, *answer.logprobs]
            has_prompt = bool(complete.prompt_logprobs)
            offset = 0 if has_prompt else answer.offset
            choices.append(
                {
                    "index": index,
                    **self._shape.whole(echo + complete.text, complete.tool_calls),
                    "logprobs": await self._logprobs(positions, offset, has_prompt=has_prompt),
                    **_ending(complete),
                }
            )
        await self._call.answer_json(
            {
                **self._common,
                "choices": choices,
                "usage": answers.usage(
                    map(_unsaid, completes) if self._ask.is_silent else completes
                ),
                "lorary": answers.receipt(completes[-1].receipt),
            }
        )


class _Stream(_Telling):
    """Tells every event as it comes."""

    async def on_event(self, place: int, event: pb.GenerateResponse) -> None:
        if event.HasField("chunk"):
            await self._on_chunk(self._index(place, event.chunk.index), event.chunk)
            return
        index = self._index(place, event.complete.index)
        answer = self._answers[index]
        await self._open(index, answer)
        answer.complete = event.complete
        said = {**self._shape.piece(""), "logprobs": None, **_ending(event.complete)}
        lorary = answers.receipt(event.complete.receipt)
        await self._say({"index": index, **said}, lorary=lorary)

    async def finish(self) -> None:
        if self._ask.has_usage:
            used = answers.usage(self._completes())
            await self._call.event({**self._common, "choices": [], "usage": used})
        await self._call.end()

    async def _on_chunk(self, index: int, chunk: pb.GenerateChunk) -> None:
        answer = self._answers[index]
        await self._open(index, answer)
        # Text runs behind its tokens while it may be part of a character or of a stop string.
        if not chunk.text and not chunk.logprobs and not chunk.tool_calls:
            return
        logprobs = await self._logprobs(chunk.logprobs, answer.offset)
        if logprobs is not None:
            texts = await self._pieces.of(chunk.logprobs)
            answer.offset += sum(len(texts[p.chosen.token_id]) for p in chunk.logprobs)
        piece = self._shape.piece(chunk.text, chunk.tool_calls)
        said = {**piece, "logprobs": logprobs, "finish_reason": None}
        await self._say({"index": index, **said})

    async def _open(self, index: int, answer: _Answer) -> None:
        """Say what comes before an answer's first text."""
        if answer.is_open:
            return
        answer.is_open = True
        echo = self._echoes[index // self._ask.num_answers]
        opening = self._shape.piece(echo) if echo else self._shape.opening()
        if opening is not None:
            await self._say({"index": index, **opening, "logprobs": None, "finish_reason": None})

    async def _say(self, choice: Mapping[str, Any], **more: Any) -> None:
        if self._ask.has_usage:
            more["usage"] = None
        await self._call.event({**self._common, "choices": [choice], **more})


def _unsaid(complete: pb.GenerateComplete) -> pb.GenerateComplete:
    """Return the end of an answer whose caller wanted the prompt alone."""
    silent = pb.GenerateComplete()
    silent.CopyFrom(complete)
    silent.text, silent.matched_stop, silent.usage.completion_tokens = "", "", 0
    silent.finish_reason = pb.FINISH_REASON_LENGTH
    return silent


def _ending(complete: pb.GenerateComplete) -> dict[str, Any]:
    return {
        "finish_reason": answers.FINISH_REASONS[complete.finish_reason],
        "stop_reason": complete.matched_stop or None,
    }
