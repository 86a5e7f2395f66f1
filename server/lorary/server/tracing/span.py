"""The span of one call, and what the service tells it; imports no OpenTelemetry.

A call has one span, whichever door it came through, with attributes by OpenTelemetry's conventions for
generative AI (repository ``semantic-conventions-genai``, docs/gen-ai/client-inference.md; its names of
November 2026) and Lorary's own beside them (``lorary.*``). Its children are the phases of each answer::

    chat sentiment                      arrival to end
      lorary.queue                      arrival to the first step, adapter load included
      lorary.adapter_load               what of that it waited for its adapter
      lorary.prefill                    first step to first token
      lorary.decode                     first token to last

They are made of the timings that the engine measures anyway, when the answer has ended: nothing is done
per token but to count it.
"""

from __future__ import annotations

import json
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lorary.errors import LoraryError, reason
from lorary.server.access.identity import tenant_name
from lorary.server.current_call import request_id
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

    from lorary.server.engine.request import Finish, Output, Request
    from lorary.server.targets import Target

    Asked = pb.GenerateRequest | pb.ClassifyRequest | pb.ScoreRequest | pb.EmbedRequest

PROVIDER = "lorary"
MAX_NAME_CHARS = 256

# A server's span is an error where the server, and not its caller, is at fault (OpenTelemetry's conventions
# for gRPC servers; over HTTP these are the statuses from 500 on).
FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
# What calls do that generate no text; the conventions have a name for the last.
_READING = {pb.ClassifyRequest: "classify", pb.ScoreRequest: "score", pb.EmbedRequest: "embeddings"}
# What a call may say of sampling, and the conventions' name for it.
_SAMPLING = {
    name: f"gen_ai.request.{name}"
    for name in (
        *("temperature", "top_p", "top_k", "max_tokens", "seed"),
        *("frequency_penalty", "presence_penalty"),
    )
}


class Meter(Protocol):
    """What is told every output of one answer."""

    def on_output(self, output: Output) -> None:
        """See what one step made of it."""
        ...


_current: ContextVar[CallSpan | None] = ContextVar("lorary_span", default=None)


def current_span() -> CallSpan | None:
    """Return the span of the call that this task works for; None where nothing is recorded of it."""
    return _current.get()


def set_span(span: CallSpan | None) -> None:
    """Say which call this task, and those that it begins, work for from here on."""
    _current.set(span)


def watched(meters: Sequence[Meter], request: Request) -> Sequence[Meter]:
    """Return what is told the outputs of a call's answers; ``meters`` themselves where it has no span.

    Args:
        meters: one for each answer.
        request: what they are answers to; it has just been given to the engine.
    """
    span = _current.get()
    return meters if span is None else span.watch(meters, request)


class CallSpan:
    """One call as its trace has it; used on the event loop.

    Args:
        tracer: makes the children.
        span: has begun.
        within: the context in which it is the parent.
        base: name of the resident base.
        has_content: whether prompts and answers are recorded.
    """

    def __init__(
        self, tracer: Tracer, span: Span, within: Context, *, base: str, has_content: bool
    ) -> None:
        self._tracer = tracer
        self._span = span
        self._within = within
        self._base = base
        self._has_content = has_content
        # Spans have the time of day; what is measured here is measured with a clock that nobody sets.
        self._to_day_ns = time.time_ns() - time.monotonic_ns()
        self._began_ns = time.monotonic_ns()
        self._operation = ""
        self._is_stream = False
        self._phase = "prepare"
        self._first_token_ns = 0
        self._num_read = self._num_cached = self._num_generated = 0
        self._num_prompts = 0
        # By prompt, and by answer to it: why it ended, and its text.
        self._ended: dict[tuple[int, int], tuple[str, str]] = {}

    def will_stream(self) -> None:
        """Note that the caller gets the answer piece by piece."""
        self._is_stream = True
        self._span.set_attribute("gen_ai.request.stream", True)

    def on_request(self, request: Asked, kind: str) -> None:
        """Note what is asked; ``kind`` is the input's: text, prompt, chat or token_ids."""
        self._operation = _READING.get(type(request)) or (
            "chat" if kind == "chat" else "text_completion"
        )
        facts: dict[str, Any] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": PROVIDER,
        }
        if isinstance(request, pb.GenerateRequest):
            facts |= _sampling(request.sampling)
        if isinstance(request, pb.EmbedRequest):
            if request.HasField("dimensions"):
                facts["gen_ai.embeddings.dimension.count"] = request.dimensions
        elif self._has_content and (messages := _messages(request.input, kind)):
            facts["gen_ai.input.messages"] = messages
        self._span.set_attributes(facts)

    def on_refs(self, named: Sequence[tuple[str, float]]) -> None:
        """Note what the call names, which may be no adapter at all."""
        asked = "+".join(ref for ref, _ in named) or self._base
        self._span.set_attribute("gen_ai.request.model", asked[:MAX_NAME_CHARS])

    def on_target(self, target: Target) -> None:
        """Note what that turned out to be; the span's name says it, too, for there are only so many."""
        facts: dict[str, Any] = {"gen_ai.response.model": target.name or self._base}
        if target.digest:
            if target.version:
                facts["gen_ai.response.model"] = f"{target.name}@{target.version}"
                facts["lorary.adapter.version"] = target.version
            facts["lorary.adapter.name"] = target.name
            facts["lorary.adapter.digest"] = target.digest
            facts["lorary.canary"] = target.is_canary
        self._span.set_attributes(facts)
        if self._operation:
            name = (target.name or self._base)[:MAX_NAME_CHARS]
            self._span.update_name(f"{self._operation} {name}")

    def watch(self, meters: Sequence[Meter], request: Request) -> Sequence[Meter]:
        """Return meters that tell this span what they are told; see ``watched``."""
        self._phase = "waiting"
        self._num_read += len(request.prompt_ids)
        asked = _Asked(
            place=self._num_prompts,
            arrived_ns=int(request.arrived_s * 1e9),
            submitted_ns=time.monotonic_ns(),
        )
        self._num_prompts += 1
        return [_Watched(meter, self, asked) for meter in meters]

    def on_output(self, output: Output, asked: _Asked) -> None:
        """Count what one step made of an answer; its phases are known when it has ended."""
        if output.token_ids:
            if not self._first_token_ns:
                self._first_token_ns = time.monotonic_ns()
                self._phase = "decode"
            self._num_generated += len(output.token_ids)
        if output.finish is not None:
            self._on_finish(output.index, output.finish, asked)

    def end(self, code: str, error: BaseException | None, facts: Mapping[str, Any]) -> None:
        """End the span.

        What an error says stays in the log, under the request's id: it may quote the prompt.

        Args:
            code: gRPC's name of how the call ended, also where it came over HTTP.
            error: what ended it, if that is known.
            facts: what only the door knows.
        """
        if not self._span.is_recording():
            return
        span = self._span
        span.set_attributes(facts)
        span.set_attribute("lorary.request_id", request_id())
        if tenant := tenant_name():
            span.set_attribute("lorary.tenant", tenant)
        if self._phase != "prepare":
            span.set_attributes(self._usage())
        if code != "OK":
            what = reason(type(error)) if isinstance(error, LoraryError) else code
            span.set_attribute("error.type", what)
            if self._operation:
                span.set_attribute("lorary.phase", self._phase)
            if code in FAULTS:
                from opentelemetry.trace import StatusCode

                span.set_status(StatusCode.ERROR, what)
        span.end()

    def _usage(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "gen_ai.usage.input_tokens": self._num_read,
            "gen_ai.usage.output_tokens": self._num_generated,
        }
        if self._num_cached:
            facts["gen_ai.usage.cache_read.input_tokens"] = self._num_cached
        if self._is_stream and self._first_token_ns:
            waited_ns = self._first_token_ns - self._began_ns
            facts["gen_ai.response.time_to_first_chunk"] = waited_ns / 1e9
        if self._ended:
            ended = [self._ended[key] for key in sorted(self._ended)]
            facts["gen_ai.response.finish_reasons"] = [why for why, _ in ended]
            if self._has_content:
                facts["gen_ai.output.messages"] = json.dumps(
                    [_message("assistant", text) for _, text in ended], ensure_ascii=False
                )
        return facts

    def _on_finish(self, index: int, finish: Finish, asked: _Asked) -> None:
        """Make the children of an answer that has ended."""
        is_read = finish.reason in ("scored", "embedded")
        if index == 0:  # a prompt counts once, however many answers it has
            self._num_cached += finish.cached_tokens
        if not is_read:
            self._ended[asked.place, index] = (finish.reason, finish.text)
        started_ns = asked.arrived_ns + finish.queue_ns
        first_ns = started_ns + finish.prefill_ns
        which = {"lorary.prompt": asked.place, "lorary.answer": index}
        self._child("lorary.queue", asked.arrived_ns, started_ns, which)
        if finish.adapter_load_ns:
            # It began a moment before the engine had the request, and was over before the first step.
            loaded_ns = min(asked.submitted_ns + finish.adapter_load_ns, started_ns)
            self._child("lorary.adapter_load", loaded_ns - finish.adapter_load_ns, loaded_ns, which)
        read = {
            **which,
            "lorary.prompt_tokens": finish.prompt_tokens,
            "lorary.cached_tokens": finish.cached_tokens,
        }
        self._child("lorary.prefill", started_ns, first_ns, read)
        if not is_read:
            written = {
                **which,
                "lorary.generated_tokens": finish.completion_tokens,
                "lorary.merged": finish.is_merged,
            }
            self._child("lorary.decode", first_ns, first_ns + finish.decode_ns, written)

    def _child(self, name: str, start_ns: int, end_ns: int, facts: Mapping[str, Any]) -> None:
        child = self._tracer.start_span(
            name,
            context=self._within,
            start_time=start_ns + self._to_day_ns,
            attributes=dict(facts),
        )
        child.end(end_ns + self._to_day_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One prompt of a call: its place among them, and when it came and went to the engine."""

    place: int
    arrived_ns: int
    submitted_ns: int


class _Watched:
    """A meter, and the span of the call that it measures an answer of."""

    def __init__(self, meter: Meter, span: CallSpan, asked: _Asked) -> None:
        self._meter = meter
        self._span = span
        self._asked = asked

    def on_output(self, output: Output) -> None:
        self._meter.on_output(output)
        self._span.on_output(output, self._asked)


def _sampling(params: pb.SamplingParams) -> dict[str, Any]:
    """Return what a call says of sampling; what it leaves out has no attribute."""
    facts: dict[str, Any] = {
        attribute: _plain(getattr(params, field))
        for field, attribute in _SAMPLING.items()
        if params.HasField(field)  # type: ignore[arg-type]
    }
    # OpenTelemetry's integers have a sign.
    if facts.get("gen_ai.request.seed", 0) >= 2**63:
        del facts["gen_ai.request.seed"]
    if params.stop:
        facts["gen_ai.request.stop_sequences"] = list(params.stop)
    if params.HasField("n") and params.n != 1:
        facts["gen_ai.request.choice.count"] = params.n
    if params.WhichOneof("constraint") == "json_schema":
        facts["gen_ai.output.type"] = "json"
    return facts


def _plain(value: float) -> float:
    """Return what a caller wrote: 0.7, and not what float32 makes of it."""
    return float(f"{value:g}") if isinstance(value, float) else value


def _messages(message: pb.Input, kind: str) -> str:
    """Return an input as the conventions have it, in JSON; empty where it has no text."""
    if kind == "chat":
        told = [_turn(one) for one in message.chat.messages]
    elif kind in ("text", "prompt"):
        told = [_message("user", getattr(message, kind))]
    else:
        return ""
    return json.dumps(told, ensure_ascii=False)


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _turn(message: pb.ChatMessage) -> dict[str, Any]:
    """Return one message of a conversation, with its calls of tools or as the answer to one."""
    if message.role == "tool":
        answer = {
            "type": "tool_call_response",
            "id": message.tool_call_id,
            "response": message.content,
        }
        return {"role": "tool", "parts": [answer]}
    told = _message(message.role, message.content)
    told["parts"] += [
        {"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments}
        for call in message.tool_calls
    ]
    return told
