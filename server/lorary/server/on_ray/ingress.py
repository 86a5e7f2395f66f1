"""What Lorary adds to the door of Ray Serve's proxies, through the hook that Serve has for services.

Serve calls the functions named in ``grpc_servicer_functions`` in each proxy. ``add_inference`` puts the
service there with a handler around Serve's own that

- names the call's adapter as its ``multiplexed_model_id``, read from the message, so that calls of every
  client in every language find the replica that has it;
- passes the deadline on, which Serve does not;
- gives refusals back their ``google.rpc`` details and trailing metadata (``refusal``);
- turns Serve's own errors into Lorary's, without the addresses and process ids in their texts.

``add_health`` adds ``grpc.health.v1``, which load balancers ask.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorary.affinity import affinity_key
from lorary.errors import Cancelled, DeadlineExceeded, NotFound, Overloaded, Unavailable
from lorary.server.on_ray.refusal import TIMEOUT_KEY, Refusal
from lorary.server.status import DETAILS_KEY, as_code, to_status
from lorary.v1 import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from lorary.errors import LoraryError

    Context = grpc.aio.ServicerContext[Any, Any]
    _GenericHandler = grpc.GenericRpcHandler[Any, Any]
else:
    _GenericHandler = grpc.GenericRpcHandler
_HealthServicer: Any = health_pb2_grpc.HealthServicer

log = logging.getLogger("lorary.server")

MODEL_KEY = "multiplexed_model_id"
"""Serve's metadata key of what to multiplex by."""
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_HEALTHZ = "/ray.serve.RayServeAPIService/Healthz"
HEALTH_POLL_S = 1.0
_OURS = frozenset({MODEL_KEY, TIMEOUT_KEY})


def add_inference(servicer: Any, server: Any) -> None:
    """Add ``lorary.v1.Inference`` to a proxy's server."""
    register: Any = inference_pb2_grpc.add_InferenceServicer_to_server
    register(servicer, _Wrapping(server))


def add_health(servicer: Any, server: Any) -> None:
    """Add ``grpc.health.v1.Health`` to a proxy's server; it answers itself, and asks no replica."""
    server.add_passthrough_service(HEALTH)
    # Serve's own service is always there first.
    healthz = server.generic_rpc_handlers[0][0].service(_Details(_HEALTHZ)).unary_unary
    register: Any = health_pb2_grpc.add_HealthServicer_to_server
    register(_Health(healthz), server)


@dataclass(frozen=True, slots=True)
class _Details:
    """Which handler is looked for."""

    method: str
    invocation_metadata: Sequence[tuple[str, str]] = ()


class _Wrapping:
    """A server on which generated code registers handlers that are wrapped when they are called.

    Handlers by name would go past the wrapping, so there is only the generic one.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        (generated,) = handlers
        self._server.add_generic_rpc_handlers((_Handlers(generated),))

    def add_registered_method_handlers(self, _service: str, _handlers: Any) -> None:
        return


class _Handlers(_GenericHandler):
    """A service's handlers, each around what Serve made of it."""

    def __init__(self, generated: Any) -> None:
        # Serve reads and replaces this attribute.
        self._method_handlers: dict[str, Any] = generated._method_handlers

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a method; None where there is none."""
        handler = self._method_handlers.get(handler_call_details.method)
        if handler is None:
            return None
        if handler.response_streaming:
            return handler._replace(unary_stream=_streaming(handler.unary_stream))
        return handler._replace(unary_unary=_unary(handler.unary_unary))


def _unary(inner: Callable[..., Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    async def handle(request: Any, context: Context) -> bytes:
        seen = ServeView(context, request)
        answer = await inner(request, seen)
        await seen.conclude()
        return answer

    return handle


def _streaming(inner: Callable[..., AsyncIterator[bytes]]) -> Callable[..., AsyncIterator[bytes]]:
    async def handle(request: Any, context: Context) -> AsyncIterator[bytes]:
        seen = ServeView(context, request)
        messages: Any = inner(request, seen)
        async with aclosing(messages):
            async for message in messages:
                yield message
        await seen.conclude()

    return handle


class ServeView:
    """gRPC's context as Serve sees it: with metadata of ours, and with ends that are kept back."""

    def __init__(self, context: Context, request: Any) -> None:
        self._context = context
        self._code: Any = None
        self._text = ""
        self._trailing: tuple[tuple[str, str], ...] = ()
        given = context.invocation_metadata() or ()
        metadata: list[tuple[str, Any]] = [(k, v) for k, v in given if k not in _OURS]
        key = affinity_key(request)
        if key is not None:
            metadata.append((MODEL_KEY, key))
        left_s = context.time_remaining()
        if left_s is not None:
            metadata.append((TIMEOUT_KEY, f"{left_s:.6f}"))
        self._metadata = metadata

    async def conclude(self) -> None:
        """End the call as the replica, or Serve, wanted it to end."""
        code = as_code(self._code) if self._code else grpc.StatusCode.OK
        if code == grpc.StatusCode.OK:
            self._context.set_trailing_metadata(self._trailing)
            return
        refusal = Refusal.unpack(self._text)
        if refusal is None:
            log.warning("a call ended in Serve with %s: %s", code.name, self._text)
            refusal = Refusal(to_status(serves_own(code)), self._trailing)
        await self._context.abort(
            as_code(refusal.status.code),
            refusal.status.message,
            trailing_metadata=(
                *refusal.trailing,
                (DETAILS_KEY, refusal.status.SerializeToString()),
            ),
        )

    # -- what Serve asks a context for -----------------------------------------------------------

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        """Return the caller's metadata and ours."""
        return self._metadata

    def code(self) -> Any:
        """Return the status so far."""
        return self._code

    def set_code(self, code: Any) -> None:
        """Keep the status."""
        self._code = code

    def details(self) -> str:
        """Return the text so far."""
        return self._text

    def set_details(self, text: str) -> None:
        """Keep the text."""
        self._text = text

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the facts so far."""
        return self._trailing

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """Keep the facts."""
        self._trailing = tuple(metadata)

    def auth_context(self) -> Any:
        """Return what TLS knows of the caller."""
        return self._context.auth_context()

    def peer(self) -> str:
        """Return the caller's address."""
        return self._context.peer()

    def peer_identities(self) -> Any:
        """Return who the caller is, to TLS."""
        return self._context.peer_identities()

    def peer_identity_key(self) -> Any:
        """Return by what TLS knows that."""
        return self._context.peer_identity_key()


def serves_own(code: grpc.StatusCode) -> LoraryError:
    """Return our error for one that no replica raised, but Serve itself."""
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded("every replica is full, and so is the queue before them; retry later.")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("no replica answered in time; allow more time.")
    if code == grpc.StatusCode.CANCELLED:
        return Cancelled("the call was cancelled.")
    if code == grpc.StatusCode.NOT_FOUND:
        return NotFound("no application of this name runs here; check the metadata 'application'.")
    return Unavailable(
        "the replica that had the call is gone, or there is none yet; ask again.", retry_after_s=0.5
    )


class _Health(_HealthServicer):  # type: ignore[misc]
    """SERVING while the proxy wants calls, by Serve's own account."""

    def __init__(self, healthz: Callable[..., Awaitable[bytes]]) -> None:
        self._healthz = healthz

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer once."""
        if request.service not in ("", INFERENCE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=await self._status(context))

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        """Answer now, and whenever it changes."""
        last = None
        while True:
            status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if request.service in ("", INFERENCE):
                status = await self._status(context)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(HEALTH_POLL_S)

    async def _status(self, context: Context) -> Any:
        seen = ServeView(context, None)
        await self._healthz(status_pb2.Status(), seen)
        is_good = as_code(seen.code()) == grpc.StatusCode.OK
        kind = health_pb2.HealthCheckResponse
        return kind.SERVING if is_good else kind.NOT_SERVING
