"""The gRPC face of the control plane: what is resident, and what should be."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRequest
from lorary.v1 import control_pb2 as pb
from lorary.v1 import control_pb2_grpc

if TYPE_CHECKING:
    import grpc

    from lorary.server.ports import RegistryLike, ResidencyLike, ResidentLike, VersionLike
    from lorary.server.targets import Target, Targets

    Context = grpc.aio.ServicerContext[Any, Any]

# How often a call looks whether its adapter has arrived; loads take tens of milliseconds.
POLL_S = 0.01

_STATES = {
    "loading": pb.RESIDENCY_LOADING,
    "resident": pb.RESIDENCY_RESIDENT,
    "unloading": pb.RESIDENCY_UNLOADING,
}


class ControlService(control_pb2_grpc.ControlServicer):
    """``lorary.v1.Control``."""

    def __init__(self, registry: RegistryLike, residency: ResidencyLike, targets: Targets) -> None:
        self._registry = registry
        self._residency = residency
        self._targets = targets

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: Context | None
    ) -> pb.ListAdaptersResponse:
        """List versions, by name and number, with their residency."""
        versions = await self._targets.run(self._registry.list)
        residents = {resident.digest: resident for resident in self._residency.snapshot()}
        adapters = [
            _adapter(version, residents.get(version.digest))
            for version in versions
            if version.digest in residents or not request.resident_only
        ]
        # A version that was deleted while it is resident goes on serving, and is shown.
        orphans = residents.keys() - {version.digest for version in versions}
        adapters.extend(_adapter(None, residents[digest]) for digest in orphans)
        adapters.sort(key=lambda adapter: (adapter.name, adapter.version))
        return pb.ListAdaptersResponse(adapters=adapters)

    async def LoadAdapter(  # noqa: N802
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        """Load a version and answer once it is resident."""
        target = await self._target(request.adapter)
        started = time.monotonic_ns()
        lease = self._residency.acquire(target.resolved)
        was_resident = lease.is_ready
        try:
            while not lease.is_ready:
                if lease.error is not None:
                    raise lease.error
                await asyncio.sleep(POLL_S)
            # Held, so it cannot be evicted before it is pinned.
            self._residency.load(target.resolved, pin=request.pin)
            described = self._describe(target)
        finally:
            lease.release()
        load_ns = 0 if was_resident else time.monotonic_ns() - started
        return pb.LoadAdapterResponse(adapter=described, load_ns=load_ns)

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Free a version once its running requests have ended."""
        target = await self._target(request.adapter)
        self._residency.unload(target.digest)
        return pb.UnloadAdapterResponse(adapter=self._describe(target))

    async def _target(self, ref: str) -> Target:
        if not ref:
            raise InvalidRequest(
                "adapter is empty, which means the bare base; name an adapter.", field="adapter"
            )
        return await self._targets.resolve(ref)

    def _resident(self, digest: str) -> ResidentLike | None:
        return next((r for r in self._residency.snapshot() if r.digest == digest), None)

    def _describe(self, target: Target) -> pb.Adapter:
        """Return a version's state now, from the manifest where it is not resident."""
        adapter = _adapter(None, self._resident(target.digest))
        adapter.name, adapter.version = target.name, target.version
        adapter.digest = target.digest
        if target.task is not None:
            adapter.task = target.task.kind
        return adapter


def _adapter(version: VersionLike | None, resident: ResidentLike | None) -> pb.Adapter:
    """Merge what the registry and the device know of one digest."""
    adapter = pb.Adapter(residency=pb.RESIDENCY_REGISTRY)
    if resident is not None:
        adapter.name, adapter.version = resident.name, resident.version
        adapter.digest, adapter.rank = resident.digest, resident.rank
        adapter.residency = _STATES[resident.state]
        adapter.pinned = resident.pinned
        adapter.device_bytes = resident.device_bytes
        adapter.num_running = resident.num_holders
    if version is not None:  # last: the same content may be published under two names
        adapter.name, adapter.version = version.name, version.version
        adapter.digest, adapter.rank = version.digest, version.rank
        adapter.aliases.extend(version.aliases)
        adapter.task = version.task_kind
    return adapter
