"""What wraps every call: an id, a catch-all, and the request metrics; in this order, outermost first.

1. ``RequestIdInterceptor`` gives the call an id (the caller's ``lorary-request-id``, or a new one),
   visible to logs through ``current_call`` and to the caller in the trailing metadata.
2. ``ErrorInterceptor`` turns an error into a rich status. What is not a ``LoraryError`` becomes
   INTERNAL with an opaque id; its text goes to the log and never to the caller. The same holds for
   our own errors about the server's inside (``status.PRIVATE``), which keep their status.
3. ``MetricsInterceptor`` counts the call by method and code, and times it.
   ``tracing.calls.TracingInterceptor``, where traces are asked for, gives it a span.
4. ``access.guard.AccessInterceptor``, where there are tenants, says who calls and what is theirs.
5. ``DecodingInterceptor`` refuses a message that does not parse.

``asyncio.CancelledError`` (deadline, cancel, disconnect) passes through all of them.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import time
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from lorary.errors import InvalidRequest, LoraryError
from lorary.server import status
from lorary.server.current_call import begin_call, current_call

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from lorary.server.caller import Facts

    Context = grpc.aio.ServicerContext[Any, Any]
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor

REQUEST_ID_KEY = "lorary-request-id"
MAX_REQUEST_ID_CHARS = 128
log = logging.getLogger("lorary.server")


def is_valid_request_id(text: str) -> bool:
    """Whether ``text`` may travel in metadata, headers and logs.

    That is 1 to 128 printable ASCII characters without spaces at the ends, which no header may have.
    """
    is_short = 0 < len(text) <= MAX_REQUEST_ID_CHARS
    return is_short and text.isascii() and text.isprintable() and text == text.strip()


def set_request_id(context: Facts, value: str) -> None:
    """Make ``value`` the id of the current call, in logs and in the trailing metadata."""
    (current_call() or begin_call()).request_id = value
    add_trailing(context, REQUEST_ID_KEY, value)


def add_trailing(context: Facts, key: str, value: str) -> None:
    """Set one key of the trailing metadata, keeping the others (grpc replaces them all)."""
    kept = tuple(item for item in (context.trailing_metadata() or ()) if item[0] != key)
    context.set_trailing_metadata((*kept, (key, value)))


class CallMetrics(Protocol):
    """What ``MetricsInterceptor`` reports to."""

    def on_call(self, method: str, code: str, seconds: float) -> None:
        """Count one finished call."""
        ...


class Around(_Interceptor):
    """Base: runs every handler of the server inside ``around``."""

    def __init__(self) -> None:
        self._wrappers: dict[str, tuple[Any, Any]] = {}

    def around(
        self, method: str, request: Any, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """Return the context manager that a call of ``method`` runs in.

        ``request`` is its message, or the iterator of them where they are streamed.
        """
        raise NotImplementedError

    def read(self, request: Any) -> Any:
        """Return what the handler gets for ``request``: the same, if a subclass does not say otherwise."""
        return request

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler, whichever of the four kinds it is; unknown methods stay unknown."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known, wrapper = self._wrappers.get(method, (None, None))
        if known is not handler:
            wrapper = self._wrapper(handler, method)
            self._wrappers[method] = handler, wrapper
        return wrapper

    def _wrapper(self, handler: Any, method: str) -> Any:
        wrap = _WRAPPERS[handler.request_streaming, handler.response_streaming]
        behaviour = next(
            b
            for b in (
                handler.unary_unary,
                handler.unary_stream,
                handler.stream_unary,
                handler.stream_stream,
            )
            if b is not None
        )
        return wrap(
            self._wrapped(behaviour, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _wrapped(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def generator(request: Any, context: Context) -> Any:
                async with (
                    self.around(method, request, context),
                    aclosing(behaviour(self.read(request), context)) as g,
                ):
                    async for response in g:
                        yield response

            return generator

        async def coroutine(request: Any, context: Context) -> Any:
            async with self.around(method, request, context):
                return await behaviour(self.read(request), context)

        return coroutine


_WRAPPERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class RequestIdInterceptor(Around):
    """Names every call."""

    def around(
        self, method: str, request: Any, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """Set the id, taken from the caller's metadata when it is a usable one."""
        return _Named(context)


class _Named:
    """Holds the call's id in the context variable while the call runs."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        metadata = dict(self._context.invocation_metadata() or ())
        given = metadata.get(REQUEST_ID_KEY, "")
        known = isinstance(given, str) and is_valid_request_id(given)
        begin_call()
        set_request_id(self._context, str(given) if known else secrets.token_hex(8))

    async def __aexit__(self, *_: object) -> None:
        return None


class ErrorInterceptor(Around):
    """Turns errors into statuses; the only place that does."""

    def around(
        self, method: str, request: Any, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """End the call with the status of what it raised."""
        return _Guarded(method, context)


class _Guarded:
    def __init__(self, method: str, context: Context) -> None:
        self._method = method
        self._context = context

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        # A CancelledError, an AbortError and a GeneratorExit go on as they are.
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        if isinstance(error, grpc.aio.InternalError):
            # What the handler sent could not be: its caller has gone, and grpc has not told it yet.
            raise asyncio.CancelledError from error
        if isinstance(error, LoraryError) and not isinstance(error, status.PRIVATE):
            name, text = type(error).__name__, status.clip(str(error))
            log.info("%s refused: %s: %s", self._method, name, text)
            await status.abort(self._context, status.to_status(error))
        error_id = secrets.token_hex(8)
        log.error("%s failed, error %s", self._method, error_id, exc_info=error)
        await status.abort(self._context, status.private_status(error, error_id))


class MetricsInterceptor(Around):
    """Counts and times every call."""

    def __init__(self, metrics: CallMetrics) -> None:
        super().__init__()
        self._metrics = metrics

    def around(
        self, method: str, request: Any, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """Report method, code and seconds once the call has ended."""
        return _Measured(self._metrics, method, context)


class _Measured:
    def __init__(self, metrics: CallMetrics, method: str, context: Context) -> None:
        self._metrics = metrics
        self._method = method
        self._context = context
        self._started = 0.0

    async def __aenter__(self) -> None:
        self._started = time.monotonic()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        seconds = time.monotonic() - self._started
        code = ending_code(self._context, error).name
        self._metrics.on_call(self._method, code, seconds)
        log.debug("%s ended: %s, %.4f s", self._method, code, seconds)


def ending_code(context: Context, error: BaseException | None) -> grpc.StatusCode:
    """Return the status of a call that ends with ``error``, or with none."""
    if error is None:
        return grpc.StatusCode.OK
    if isinstance(error, grpc.aio.AbortError):
        return status.as_code(context.code())
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        remaining = context.time_remaining()
        is_late = remaining is not None and remaining <= 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
    return status.code_of(error)


class Undecodable:
    """Stands for a message whose bytes are none of its type."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __str__(self) -> str:
        return f"no message: {self.why}"


class DecodingInterceptor(Around):
    """Lets a message that does not parse come as far as any other bad input.

    Left to itself, gRPC parses before anything of ours runs, and ends such a call with UNKNOWN: no id, no
    details, nothing counted.
    """

    def around(
        self, method: str, request: Any, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """Return what does nothing."""
        return nullcontext()

    def read(self, request: Any) -> Any:
        """Return a message as it is, and messages one by one.

        Raises:
            InvalidRequest: the bytes are no message of the method's.
        """
        if isinstance(request, Undecodable):
            raise InvalidRequest(
                f"the bytes sent are no message of this method's type: {request.why}. Make them with the stubs "
                "of lorary.v1.",
                field="request",
            )
        return self._each(request) if hasattr(request, "__aiter__") else request

    async def _each(self, requests: Any) -> Any:
        async for request in requests:
            yield self.read(request)

    def _wrapper(self, handler: Any, method: str) -> Any:
        """Wrap the handler, and how it reads bytes."""
        wrapper = super()._wrapper(handler, method)
        strict = wrapper.request_deserializer
        if strict is None:
            return wrapper

        def lenient(raw: bytes) -> Any:
            try:
                return strict(raw)
            except DecodeError as error:
                return Undecodable(str(error))

        return wrapper._replace(request_deserializer=lenient)
