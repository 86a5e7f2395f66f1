"""The span of one call, and what the service tells it; imports no OpenTelemetry.

A call has one span, whichever door it came through, with attributes by OpenTelemetry's conventions for
generative AI (repository ``semantic-conventions-genai``, docs/gen-ai/client-inference.md; its names of
November 2026) and Lorary's own beside them (``lorary.*``). Its children are the phases of each answer::

    chat sentiment                      arrival to end
      lorary.queue                      arrival to the first step, adapter load included
      lorary.adapter_load               what of that it waited for its adapter
      lorary.prefill                    first step to first token
      lorary.decode                     first token to last

They are made when the call has ended, of the timings that the engine measures anyway: nothing is done per
token but to count it. Of an answer that was cut short only its tokens are known::

      lorary.waiting                    arrival to the first token, or to the end
      lorary.decode                     first token to the end
"""

from __future__ import annotations

import json
import time
from contextvars import ContextVar
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
MAX_TOLD = 16
"""Answers of one call whose phases are told: of a thousand inputs to embed nobody would read them all."""

# A server's span is an error where the server, and not its caller, is at fault (OpenTelemetry's conventions
# for gRPC servers; over HTTP these are the statuses from 500 on).
FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
# What calls do that generate no text; the conventions have a name for the last.
_READING = {pb.ClassifyRequest: "classify", pb.ScoreRequest: "score", pb.EmbedRequest: "embeddings"}
# Ends of answers that generated nothing.
_READ_ONLY = ("scored", "embedded")
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
        self._num_prompts = 0
        self._asked: list[dict[str, Any]] = []
        self._answers: list[_Answer] = []

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
        elif self._has_content and kind != "token_ids":
            self._asked += _messages(request.input, kind)
            facts["gen_ai.input.messages"] = json.dumps(self._asked, ensure_ascii=False)
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
        """Return meters that remember for this span what they are told; see ``watched``."""
        submitted_ns = time.monotonic_ns()
        new = [
            _Answer(
                meter,
                prompt=self._num_prompts,
                index=index,
                num_read=len(request.prompt_ids),
                arrived_ns=int(request.arrived_s * 1e9),
                submitted_ns=submitted_ns,
            )
            for index, meter in enumerate(meters)
        ]
        self._num_prompts += 1
        self._answers += new
        return new

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
        if self._answers:
            span.set_attributes(self._usage())
            for answer in self._answers[:MAX_TOLD]:
                self._tell_phases(answer)
        if code != "OK":
            what = reason(type(error)) if isinstance(error, LoraryError) else code
            span.set_attribute("error.type", what)
            if self._operation:
                span.set_attribute("lorary.phase", self._phase)
            if code in FAULTS:
                from opentelemetry.trace import StatusCode

                span.set_status(StatusCode.ERROR, what)
        span.end()

    @property
    def _first_token_ns(self) -> int:
        """When the first token of any answer came; 0 before."""
        return min((one.first_ns for one in self._answers if one.first_ns), default=0)

    @property
    def _phase(self) -> str:
        if not self._answers:
            return "prepare"
        return "decode" if self._first_token_ns else "waiting"

    def _usage(self) -> dict[str, Any]:
        # A prompt counts once, however many answers it has.
        prompts = [one for one in self._answers if one.index == 0]
        facts: dict[str, Any] = {
            "gen_ai.usage.input_tokens": sum(one.num_read for one in prompts),
            "gen_ai.usage.output_tokens": sum(one.num_written for one in self._answers),
        }
        if cached := sum(one.finish.cached_tokens for one in prompts if one.finish is not None):
            facts["gen_ai.usage.cache_read.input_tokens"] = cached
        if self._is_stream and self._first_token_ns:
            waited_ns = self._first_token_ns - self._began_ns
            facts["gen_ai.response.time_to_first_chunk"] = waited_ns / 1e9
        written = [
            one.finish
            for one in self._answers
            if one.finish is not None and one.finish.reason not in _READ_ONLY
        ]
        if written:
            facts["gen_ai.response.finish_reasons"] = [finish.reason for finish in written]
            if self._has_content:
                facts["gen_ai.output.messages"] = json.dumps(
                    [_message("assistant", finish.text) for finish in written], ensure_ascii=False
                )
        return facts

    def _tell_phases(self, answer: _Answer) -> None:
        """Make the children of one answer."""
        which = {"lorary.prompt": answer.prompt, "lorary.answer": answer.index}
        arrived_ns, finish = answer.arrived_ns, answer.finish
        if finish is None:
            now_ns = time.monotonic_ns()
            self._child("lorary.waiting", arrived_ns, answer.first_ns or now_ns, which)
            if answer.first_ns:
                written = {**which, "lorary.generated_tokens": answer.num_written}
                self._child("lorary.decode", answer.first_ns, now_ns, written)
            return
        started_ns = arrived_ns + finish.queue_ns
        first_ns = started_ns + finish.prefill_ns
        self._child("lorary.queue", arrived_ns, started_ns, which)
        if finish.adapter_load_ns:
            # It began a moment before the engine had the request, and was over before the first step.
            loaded_ns = min(answer.submitted_ns + finish.adapter_load_ns, started_ns)
            self._child("lorary.adapter_load", loaded_ns - finish.adapter_load_ns, loaded_ns, which)
        read = {
            **which,
            "lorary.prompt_tokens": finish.prompt_tokens,
            "lorary.cached_tokens": finish.cached_tokens,
            "lorary.cached_below_tokens": finish.cached_below_tokens,
        }
        self._child("lorary.prefill", started_ns, first_ns, read)
        if finish.reason not in _READ_ONLY:
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


class _Answer:
    """A meter that remembers, for its call's span, what one answer came to.

    Args:
        meter: is told everything, too.
        prompt: which prompt of the call it answers.
        index: which answer to it this is.
        num_read: tokens of the prompt.
        arrived_ns: when the call came, by the monotonic clock.
        submitted_ns: when the engine had got it.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        prompt: int,
        index: int,
        num_read: int,
        arrived_ns: int,
        submitted_ns: int,
    ) -> None:
        self._meter = meter
        self.prompt = prompt
        self.index = index
        self.num_read = num_read
        self.arrived_ns = arrived_ns
        self.submitted_ns = submitted_ns
        self.first_ns = 0
        self.num_written = 0
        self.finish: Finish | None = None

    def on_output(self, output: Output) -> None:
        """See what one step made of it."""
        self._meter.on_output(output)
        if output.token_ids:
            self.first_ns = self.first_ns or time.monotonic_ns()
            self.num_written += len(output.token_ids)
        if output.finish is not None:
            self.finish = output.finish


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


def _messages(message: pb.Input, kind: str) -> list[dict[str, Any]]:
    """Return an input of text as the conventions have it."""
    if kind == "chat":
        return [_turn(one) for one in message.chat.messages]
    return [_message("user", message.text if kind == "text" else message.prompt)]


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
