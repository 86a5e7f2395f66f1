"""The beginning of a call's span, at either door: whose trace it continues, and what logs say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.server.current_call import current_call
from lorary.server.interceptors import Around, ending_code
from lorary.server.tracing.span import CallSpan, set_span

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from opentelemetry.trace import Tracer

    from lorary.server.interceptors import Context

# Lorary's own services, and what clients of the Open Inference Protocol call about models.
_TRACED = ("/lorary.v1.", "/inference.GRPCInferenceService/Model")
_STREAMED = "/Generate"


class Tracing:
    """Makes a span for every call; one for all doors of a server.

    Args:
        tracer: what makes them.
        base: name of the resident base, which is the model of calls without an adapter.
        has_content: whether prompts and answers are recorded.
        close: sends what is left; may block for a few seconds.
    """

    def __init__(
        self, tracer: Tracer, *, base: str, has_content: bool, close: Callable[[], None]
    ) -> None:
        # Here, and not above: a server without traces does without OpenTelemetry.
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._extract = extract
        self._kind = SpanKind.SERVER
        self._with_span = set_span_in_context
        self._tracer = tracer
        self._base = base
        self._has_content = has_content
        self.close = close

    def begin(self, name: str, headers: Mapping[str, str], facts: Mapping[str, Any]) -> CallSpan:
        """Begin the span of the call that this task works for, with its id set already.

        Args:
            name: of the method; the call's adapter becomes part of it once it is known.
            headers: what came with the call, by lower-case name: ``traceparent`` says whose trace it is.
            facts: attributes.
        """
        parent = self._extract(headers)
        span = self._tracer.start_span(
            name, context=parent, kind=self._kind, attributes=dict(facts)
        )
        begun = CallSpan(
            self._tracer,
            span,
            self._with_span(span, parent),
            base=self._base,
            has_content=self._has_content,
        )
        ids, call = span.get_span_context(), current_call()
        if call is not None:
            call.trace_id, call.span_id = f"{ids.trace_id:032x}", f"{ids.span_id:016x}"
        set_span(begun if span.is_recording() else None)
        return begun


class TracingInterceptor(Around):
    """Gives every call about models and adapters a span; load balancers' health checks get none."""

    def __init__(self, tracing: Tracing) -> None:
        super().__init__()
        self._tracing = tracing

    def around(
        self, method: str, request: Any, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """Run a call within its span."""
        return _Traced(self._tracing, method, context)


class _Traced:
    def __init__(self, tracing: Tracing, method: str, context: Context) -> None:
        self._tracing = tracing
        self._method = method
        self._context = context
        self._span: CallSpan | None = None

    async def __aenter__(self) -> None:
        if not self._method.startswith(_TRACED):
            return
        metadata = self._context.invocation_metadata() or ()
        headers = {key: value for key, value in metadata if isinstance(value, str)}
        name = self._method.removeprefix("/")
        facts = {"rpc.system.name": "grpc", "rpc.method": name}
        self._span = self._tracing.begin(name, headers, facts)
        if self._method.endswith(_STREAMED):
            self._span.will_stream()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if self._span is not None:
            code = ending_code(self._context, error).name
            self._span.end(code, error, {"rpc.response.status_code": code})
