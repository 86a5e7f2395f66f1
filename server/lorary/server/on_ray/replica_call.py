"""One call as a replica has it: what service and interceptors need of gRPC, from what Serve passes on."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.rpc import status_pb2

from lorary.server.on_ray.refusal import TIMEOUT_KEY, Refusal
from lorary.server.service import ADAPTER_KEY
from lorary.server.status import DETAILS_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from ray.serve.grpc_util import RayServegRPCContext

    from lorary.server.interceptors import Around


class ReplicaCall:
    """Stands in for ``grpc.aio.ServicerContext``.

    Args:
        given: Serve's own context, which travels back to the ingress with every message.
        on_adapter: told the adapter's name as soon as the call's ref means one.
    """

    def __init__(self, given: RayServegRPCContext, on_adapter: Callable[[str], None]) -> None:
        self._given = given
        self._on_adapter = on_adapter
        self._facts: tuple[tuple[str, str], ...] = ()
        self._code: grpc.StatusCode | None = None
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        left = next((v for k, v in given.invocation_metadata() if k == TIMEOUT_KEY), None)
        self._ends_s = None if left is None else time.monotonic() + float(left)

    async def unary(
        self,
        method: str,
        behaviour: Callable[..., Awaitable[Any]],
        request: Any,
        around: Sequence[Around],
    ) -> Any:
        """Run a handler inside the interceptors; return its answer.

        Raises:
            grpc.aio.AbortError: the call was refused, and Serve's context says how.
        """
        context: Any = self
        async with AsyncExitStack() as stack:
            for one in around:
                await stack.enter_async_context(one.around(method, request, context))
            return await behaviour(request, self)

    async def stream(
        self,
        method: str,
        behaviour: Callable[..., Awaitable[Any]],
        request: Any,
        around: Sequence[Around],
    ) -> AsyncGenerator[Any, None]:
        """Run a handler that writes inside the interceptors; yield what it writes.

        Left early, it cancels the handler and waits for its end, so that its rows are free.

        Raises:
            grpc.aio.AbortError: the call was refused, and Serve's context says how.
        """
        work = asyncio.ensure_future(self.unary(method, behaviour, request, around))
        work.add_done_callback(lambda _: self._messages.put_nowait(None))
        try:
            while (message := await self._messages.get()) is not None:
                yield message
            work.result()
        finally:
            work.cancel()
            await asyncio.wait({work})

    # -- what service and interceptors ask a context for -----------------------------------------

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """Return the caller's metadata."""
        metadata: Sequence[tuple[str, str]] = self._given.invocation_metadata()
        return metadata

    def auth_context(self) -> dict[str, Any]:
        """Return what TLS knows of the caller; nothing, for Serve's door speaks none."""
        known: dict[str, Any] = self._given.auth_context()
        return known

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the facts so far."""
        return self._facts

    def set_trailing_metadata(self, metadata: Iterable[tuple[str, str]]) -> None:
        """Replace the facts; they go out with the next message."""
        before = dict(self._facts).get(ADAPTER_KEY)
        self._facts = tuple(metadata)
        self._given.set_trailing_metadata(list(self._facts))
        adapter = dict(self._facts).get(ADAPTER_KEY)
        if adapter and adapter != before:
            self._on_adapter(adapter)

    def time_remaining(self) -> float | None:
        """Return the seconds until the caller's deadline; None where there is none."""
        return None if self._ends_s is None else self._ends_s - time.monotonic()

    def code(self) -> grpc.StatusCode | None:
        """Return the status that the call was refused with."""
        return self._code

    async def write(self, message: Any) -> None:
        """Send one message of a stream. Serve has no flow control: a slow reader's messages wait in memory."""
        self._messages.put_nowait(message)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> None:
        """Refuse the call.

        Raises:
            grpc.aio.AbortError: always.
        """
        found = dict(trailing_metadata)
        status = status_pb2.Status.FromString(found.pop(DETAILS_KEY, b""))
        if not status.code:
            status.code, status.message = code.value[0], details
        self._code = code
        self._given.set_code(code)
        self._given.set_details(Refusal(status, tuple(found.items())).pack())
        raise grpc.aio.AbortError(code.name)
