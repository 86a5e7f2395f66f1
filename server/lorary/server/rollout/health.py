"""Health of single adapters, so that a client can wait for one with nothing but the standard service.

==========================  ============================================================================
``lorary.adapter/<ref>``    SERVING while what the ref means to callers is on the device; NOT_SERVING while
                            it is not, or the server drains; SERVICE_UNKNOWN when there is no such version
``lorary.registry``         NOT_SERVING while the registry is away and answers come from memory
==========================  ============================================================================

Nothing is kept by name: whoever asks for a thousand unknown adapters leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health, health_pb2

from lorary.errors import InvalidRef, LoraryError, NotFound

if TYPE_CHECKING:
    import grpc

    from lorary.server.ports import ResidencyLike
    from lorary.server.rollout.events import Feed
    from lorary.server.targets import Targets

    Context = grpc.aio.ServicerContext[Any, Any]

ADAPTER = "lorary.adapter/"
REGISTRY = "lorary.registry"
Status = health_pb2.HealthCheckResponse
_Servicer: Any = health.aio.HealthServicer  # type: ignore[attr-defined]


class AdapterHealth(_Servicer):  # type: ignore[misc]
    """``grpc.health.v1`` with a name for every adapter.

    Args:
        targets: what a ref means to callers.
        residency: what is on the device.
        feed: tells when either changes.
    """

    def __init__(self, targets: Targets, residency: ResidencyLike, feed: Feed) -> None:
        super().__init__()
        self._targets = targets
        self._residency = residency
        self._feed = feed
        self._is_draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Say that the registry is there, as nobody has heard otherwise."""
        await self.set(REGISTRY, Status.SERVING)

    def on_trouble(self, trouble: str) -> None:
        """Say that the registry is away (why), or is back (an empty text); on the event loop."""
        status = Status.NOT_SERVING if trouble else Status.SERVING
        task = asyncio.get_running_loop().create_task(self.set(REGISTRY, status))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def enter_graceful_shutdown(self) -> None:
        """Say NOT_SERVING for everything from here on."""
        self._is_draining = True
        await super().enter_graceful_shutdown()
        self._feed.wake()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Return one status; NOT_FOUND for what is unknown."""
        if not request.service.startswith(ADAPTER):
            return await super().Check(request, context)
        status = await self._status(request.service)
        if status == Status.SERVICE_UNKNOWN:
            raise NotFound(f"'{request.service[:200]}' names no adapter of the registry.")
        return Status(status=status)

    async def List(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Return the statuses of all names but those of adapters; gRPC's own asyncio servicer has no such thing."""
        statuses = {name: Status(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        """Write a status, and each time that it changes the new one."""
        if not request.service.startswith(ADAPTER):
            await super().Watch(request, context)
            return
        last = None
        with self._feed.subscribed() as events:
            while True:
                status = await self._status(request.service)
                if status != last:
                    await context.write(Status(status=status))
                last = status
                await events.take()

    async def _status(self, service: str) -> Any:
        try:
            target = await self._targets.resolve(service.removeprefix(ADAPTER))
        except (NotFound, InvalidRef):
            return Status.SERVICE_UNKNOWN
        except LoraryError:
            return Status.NOT_SERVING  # the registry is away, or it is another base's
        is_here = any(
            r.digest == target.digest and r.state == "resident" for r in self._residency.snapshot()
        )
        is_ready = (is_here or not target.digest) and not self._is_draining
        return Status.SERVING if is_ready else Status.NOT_SERVING
