"""From the engine's outputs to messages, and the receipt that travels with every answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import LoraryError
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.engine.request import Finish, Output, PositionLogprobs
    from lorary.server.targets import Target
    from lorary.server.tools.reader import CallReader, Piece

_FINISH_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What does not change while the server runs; ``GetServerInfo`` tells it."""

    version: str
    base: str
    base_fingerprint: str
    quantization: str
    device: str
    dtype: str
    max_context: int
    max_batch: int
    max_rank: int
    adapter_memory_bytes: int


def chunk(output: Output, piece: Piece | None = None) -> pb.GenerateResponse:
    """Return the event for new tokens of one answer; ``piece`` is what its text says where it may call tools."""
    event = pb.GenerateResponse()
    # Once a token: fields are set in place, and only those that there are.
    part = event.chunk
    part.index = output.index
    part.text = output.text if piece is None else piece.content
    part.token_ids.extend(output.token_ids)
    if output.logprobs:
        part.logprobs.extend(map(_logprobs, output.logprobs))
    if piece is not None:
        part.tool_calls.extend(
            pb.ToolCallChunk(index=call.index, id=call.id, name=call.name, arguments=call.arguments)
            for call in piece.calls
        )
    return event


def complete(
    output: Output, finish: Finish, receipt: pb.Receipt, reader: CallReader | None = None
) -> pb.GenerateResponse:
    """Return the event for the end of one answer; ``reader`` has read it where it may call tools."""
    reason: str = finish.reason
    if reason == "stop" and reader is not None and reader.has_whole_calls:
        reason = "tool_calls"
    calls = reader.calls if reader is not None else ()
    return pb.GenerateResponse(
        complete=pb.GenerateComplete(
            index=output.index,
            text=finish.text if reader is None else reader.content,
            tool_calls=[pb.ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in calls],
            finish_reason=_FINISH_REASONS[reason],
            matched_stop=finish.matched_stop,
            usage=usage(finish),
            receipt=receipt,
            prompt_logprobs=[_logprobs(position) for position in finish.prompt_logprobs],
        )
    )


def usage(finish: Finish) -> pb.Usage:
    """Return the token counts of one answer."""
    return pb.Usage(
        prompt_tokens=finish.prompt_tokens,
        completion_tokens=finish.completion_tokens,
        cached_tokens=finish.cached_tokens,
    )


def receipt(facts: ServerFacts, target: Target, request_id: str, finish: Finish) -> pb.Receipt:
    """Return the proof of what answered."""
    return pb.Receipt(
        ref=target.ref,
        name=target.name,
        version=target.version,
        digest=target.digest,
        base_fingerprint=facts.base_fingerprint,
        quantization=facts.quantization,
        request_id=request_id,
        canary=target.is_canary,
        execution=pb.EXECUTION_MERGED if finish.is_merged else pb.EXECUTION_BATCHED,
        timings=pb.Timings(
            queue_ns=finish.queue_ns,
            adapter_load_ns=finish.adapter_load_ns,
            prefill_ns=finish.prefill_ns,
            decode_ns=finish.decode_ns,
        ),
        parts=[
            pb.ComposedAdapter(
                ref=part.ref,
                name=part.name,
                version=part.version,
                digest=part.digest,
                weight=part.weight,
            )
            for part in target.parts
        ],
    )


def label_scores(labels: Sequence[str], logprobs: Sequence[float]) -> list[pb.LabelScore]:
    """Return labels with their probabilities among themselves, most likely first.

    Semantics: probability[i] = exp(logprob[i]) / sum over j of exp(logprob[j])

    Raises:
        LoraryError: a log probability is not a number, which only a broken model gives.
    """
    if len(logprobs) != len(labels) or not all(math.isfinite(value) for value in logprobs):
        raise LoraryError(
            f"the model scored {len(labels)} labels with {list(logprobs)}; no probabilities "
            "follow from that. Check the adapter's weights."
        )
    best = max(logprobs)
    weights = [math.exp(value - best) for value in logprobs]
    total = sum(weights)
    scores = [
        pb.LabelScore(label=label, probability=weight / total, logprob=value)
        for label, weight, value in zip(labels, weights, logprobs, strict=True)
    ]
    return sorted(scores, key=lambda score: -score.logprob)


def continuation_scores(
    tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]
) -> list[pb.ContinuationScore]:
    """Return how likely each continuation is, in their order.

    Raises:
        LoraryError: a log probability is not a number, which only a broken model gives.
    """
    if any(math.isnan(value) for values in logprobs for value in values):
        raise LoraryError(
            f"the model scored continuations with {[list(values) for values in logprobs]}; that is no "
            "probability. Check the adapter's weights."
        )
    return [
        pb.ContinuationScore(
            logprob=sum(values), tokens=[_logprob(pair) for pair in zip(ids, values, strict=True)]
        )
        for ids, values in zip(tokens, logprobs, strict=True)
    ]


def embedding(finish: Finish, receipt: pb.Receipt) -> pb.Embedding:
    """Return the vector of one input.

    Raises:
        LoraryError: a component is not a finite number, which only a broken model gives.
    """
    if not all(map(math.isfinite, finish.embedding)):
        raise LoraryError(
            "the model's hidden states are not finite; no vector follows from that. Check the adapter's weights."
        )
    return pb.Embedding(values=finish.embedding, usage=usage(finish), receipt=receipt)


def _logprobs(position: PositionLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        chosen=_logprob(position.chosen), top=[_logprob(pair) for pair in position.top]
    )


def _logprob(pair: tuple[int, float]) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=pair[0], logprob=pair[1])
