"""The gRPC face of the control plane: what is resident, and what should be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lorary.errors import AdapterNotFound, InvalidRequest, LoraryError, Unavailable
from lorary.registry.aliases import UNSET
from lorary.server.access.identity import tenant_name
from lorary.server.rollout import describe
from lorary.server.rollout.aliases import AWAY
from lorary.server.rollout.build import server_name
from lorary.server.rollout.loading import arrived
from lorary.v1 import control_pb2 as pb
from lorary.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable

    import grpc

    from lorary.registry.aliases import AliasMove
    from lorary.registry.splits import Split
    from lorary.server.calls import Calls
    from lorary.server.ports import (
        MergingLike,
        RegistryLike,
        ResidencyLike,
        ResidentLike,
        VersionLike,
    )
    from lorary.server.rollout.build import Rollout
    from lorary.server.targets import Target, Targets

    Context = grpc.aio.ServicerContext[Any, Any]

_STATES = {
    "loading": pb.RESIDENCY_LOADING,
    "resident": pb.RESIDENCY_RESIDENT,
    "unloading": pb.RESIDENCY_UNLOADING,
}


class ControlService(control_pb2_grpc.ControlServicer):
    """``lorary.v1.Control``."""

    def __init__(
        self,
        registry: RegistryLike,
        residency: ResidencyLike,
        targets: Targets,
        rollout: Rollout,
        calls: Calls,
        merging: MergingLike | None = None,
    ) -> None:
        self._registry = registry
        self._residency = residency
        self._targets = targets
        self._rollout = rollout
        self._calls = calls
        self._merging = merging

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: Context | None
    ) -> pb.ListAdaptersResponse:
        """List versions, by name and number, with their residency; and the canaries."""
        return await self._list(resident_only=request.resident_only)

    async def GetAdapter(  # noqa: N802
        self, request: pb.GetAdapterRequest, context: Context
    ) -> pb.GetAdapterResponse:
        """Describe one version."""
        target = await self._target(request.adapter)
        trials = self._rollout.follower.trials
        alias = getattr(target.resolved, "alias", None)
        wanted = [t for t in trials if (t.name, t.split.alias) == (target.name, alias)]
        return pb.GetAdapterResponse(
            adapter=await self._told(target),
            rollout=describe.rollout(wanted[0]) if wanted else None,
        )

    async def PrefetchAdapter(  # noqa: N802
        self, request: pb.PrefetchAdapterRequest, context: Context
    ) -> pb.PrefetchAdapterResponse:
        """Begin to load a version; with ``wait``, answer when it is there."""
        target = await self._target(request.adapter)
        if not request.wait:
            self._residency.prefetch(target.resolved)
            return pb.PrefetchAdapterResponse(adapter=await self._told(target))
        lease = self._residency.acquire(target.resolved)
        try:
            await arrived(lease)
            adapter = await self._told(target)
        finally:
            lease.release()
        return pb.PrefetchAdapterResponse(adapter=adapter)

    async def PinAdapter(  # noqa: N802
        self, request: pb.PinAdapterRequest, context: Context
    ) -> pb.PinAdapterResponse:
        """Keep what is here from being evicted."""
        target = await self._target(request.adapter)
        if self._residency.pin(target.digest) is None:
            raise AdapterNotFound(
                f"'{request.adapter}' is not on the device, so there is nothing to pin. Load it with "
                "a pin: lorary load --pin."
            )
        return pb.PinAdapterResponse(adapter=await self._told(target))

    async def UnpinAdapter(  # noqa: N802
        self, request: pb.UnpinAdapterRequest, context: Context
    ) -> pb.UnpinAdapterResponse:
        """Let a version be evicted again."""
        target = await self._target(request.adapter)
        self._residency.pin(target.digest, pinned=False)
        return pb.UnpinAdapterResponse(adapter=await self._told(target))

    async def Watch(self, request: pb.WatchRequest, context: Context) -> None:  # noqa: N802
        """Write a snapshot, then events; a reader that is too slow is told what it missed."""
        with self._rollout.feed.subscribed() as subscription:
            await context.write(pb.WatchResponse(snapshot=await self._list(resident_only=True)))
            while True:
                events, num_lost = await subscription.take()
                if num_lost:
                    await context.write(pb.WatchResponse(num_lost=num_lost))
                    snapshot = await self._list(resident_only=True)
                    await context.write(pb.WatchResponse(snapshot=snapshot))
                    continue  # what is left of the events is older than the snapshot
                for event in events:
                    await context.write(describe.event(event))

    async def SetAlias(  # noqa: N802
        self, request: pb.SetAliasRequest, context: Context | None
    ) -> pb.SetAliasResponse:
        """Move an alias in the registry, and here as soon as the version is loaded."""
        expect: Any = UNSET
        if request.HasField("expect_version"):
            expect = request.expect_version or None
        # Here, for the registry's threads do not know whose call it is.
        actor = tenant_name() or request.actor or server_name()
        move = await self._targets.run(
            lambda: self._registry.set_alias(
                request.name,
                request.alias,
                request.version or None,
                expect=expect,
                reason=request.reason,
                actor=actor,
            )
        )
        return await self._moved(request.name, move)

    async def roll_back(
        self, name: str, alias: str, *, expect_version: int, reason: str
    ) -> pb.SetAliasResponse:
        """Return an alias to where it pointed before, as ``SetAlias``; or end its canary.

        Raises:
            AdapterNotFound: there is no such adapter or alias, or nothing to return to.
            Conflict: the alias is not at ``expect_version``.
            Refused: it is protected, and there is no reason.
        """
        actor = tenant_name() or server_name()
        move = await self._targets.run(
            lambda: self._registry.rollback(
                name, alias, expect=expect_version, reason=reason, actor=actor
            )
        )
        return await self._moved(name, move)

    async def _moved(self, name: str, move: AliasMove) -> pb.SetAliasResponse:
        """Follow a move at once, and tell it."""
        await self._rollout.follower.look(name)
        return pb.SetAliasResponse(
            from_version=move.from_version or 0, to_version=move.to_version or 0
        )

    async def _list(self, *, resident_only: bool) -> pb.ListAdaptersResponse:
        trouble = self._rollout.follower.trouble
        try:
            versions, splits = await self._targets.run(self._read)
        except AWAY as error:
            # What is on the device serves without a registry, and is shown without one.
            versions, splits, trouble = [], [], str(error)
        residents = {resident.digest: resident for resident in self._residency.snapshot()}
        # What is refused is not resident, and is what somebody who looks should see.
        shown = residents.keys() | set(self._residency.quarantined())
        adapters = [
            _adapter(version, residents.get(version.digest))
            for version in versions
            if version.digest in shown or not resident_only
        ]
        # A version that was deleted while it is resident goes on serving, and is shown.
        orphans = residents.keys() - {version.digest for version in versions}
        adapters.extend(_adapter(None, residents[digest]) for digest in orphans)
        adapters.sort(key=lambda adapter: (adapter.name, adapter.version))
        for adapter in adapters:
            self._add_verdict(adapter)
            self._add_merged(adapter)
            self._add_traffic(adapter, splits)
        follower = self._rollout.follower
        return pb.ListAdaptersResponse(
            adapters=adapters,
            rollouts=[describe.rollout(trial) for trial in follower.trials],
            behind=[describe.behind(one) for one in follower.followed if one.behind],
            registry_trouble=trouble,
        )

    def _read(self) -> tuple[list[VersionLike], list[tuple[str, Split]]]:
        """Return all versions and all canaries; on a registry thread."""
        versions = list(self._registry.list())
        names = sorted({version.name for version in versions})
        return versions, [
            (name, split) for name in names for split in self._registry.rollouts.all(name).values()
        ]

    def _add_traffic(self, adapter: pb.Adapter, splits: Iterable[tuple[str, Split]]) -> None:
        """Say what a version answered here, and whose canary it is."""
        adapter.num_served, last_s = self._rollout.traffic.of(adapter.digest)
        adapter.last_used_unix_ms = int(last_s * 1000)
        adapter.canaries.extend(
            pb.CanaryShare(
                alias=split.alias, percent=split.canary.percent, shadow=split.canary.shadow
            )
            for name, split in splits
            if (name, split.canary.version) == (adapter.name, adapter.version)
        )

    async def LoadAdapter(  # noqa: N802
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        """Load a version and answer once it is resident."""
        target = await self._target(request.adapter)
        started = time.monotonic_ns()
        if target.digest in self._residency.quarantined():
            self._residency.readmit(target.digest)
        lease = self._residency.acquire(target.resolved)
        was_resident = lease.is_ready
        try:
            await arrived(lease)
            # Held, so it cannot be evicted before it is pinned.
            self._residency.load(target.resolved, pin=request.pin)
            described = await self._told(target)
        finally:
            lease.release()
        load_ns = 0 if was_resident else time.monotonic_ns() - started
        return pb.LoadAdapterResponse(adapter=described, load_ns=load_ns)

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Free a version once its running requests have ended, or end them."""
        target = await self._target(request.adapter)
        self._residency.unload(target.digest)
        if self._merging is not None:
            self._merging.drop(target.digest)
        if request.mode == pb.UNLOAD_MODE_FORCE:
            name = f"{target.name}@{target.version}"
            error = Unavailable(f"'{name}' was unloaded by force; ask again to load it anew.")
            self._calls.fail_digest(target.digest, error)
        return pb.UnloadAdapterResponse(adapter=await self._told(target))

    async def _target(self, ref: str) -> Target:
        if not ref:
            raise InvalidRequest(
                "adapter is empty, which means the bare base; name an adapter.", field="adapter"
            )
        # What the registry says now, and not what callers still get.
        return await self._targets.lookup(ref)

    def _resident(self, digest: str) -> ResidentLike | None:
        return next((r for r in self._residency.snapshot() if r.digest == digest), None)

    async def _told(self, target: Target) -> pb.Adapter:
        """Return a version's state, traffic and canaries."""
        adapter = self._describe(target)
        try:
            found = await self._targets.run(self._registry.rollouts.all, target.name)
        except LoraryError:
            found = {}  # the call is about the device; List says what ails the registry
        self._add_traffic(adapter, [(target.name, split) for split in found.values()])
        return adapter

    def _describe(self, target: Target) -> pb.Adapter:
        """Return a version's state now, from the manifest where it is not resident."""
        adapter = _adapter(None, self._resident(target.digest))
        adapter.name, adapter.version = target.name, target.version
        adapter.digest = target.digest
        if target.task is not None:
            adapter.task = target.task.kind
        self._add_verdict(adapter)
        self._add_merged(adapter)
        return adapter

    def _add_merged(self, adapter: pb.Adapter) -> None:
        """Say whether a version is merged."""
        merged = None if self._merging is None else self._merging.merged()
        if merged is None or merged.digest != adapter.digest:
            return
        adapter.merged, adapter.merged_bytes = merged.state, merged.num_bytes
        adapter.merged_running = merged.num_holders
        if merged.verdict is not None:
            adapter.merged_divergence = merged.verdict.divergence

    def _add_verdict(self, adapter: pb.Adapter) -> None:
        """Say what came of a version's golden probes."""
        verdict = self._residency.verdict(adapter.digest)
        if verdict is not None:
            adapter.verified = verdict.state
            adapter.verified_divergence = verdict.divergence
            adapter.verified_limit = verdict.limit
        adapter.quarantined = adapter.digest in self._residency.quarantined()


def _adapter(version: VersionLike | None, resident: ResidentLike | None) -> pb.Adapter:
    """Merge what the registry and the device know of one digest."""
    adapter = pb.Adapter(residency=pb.RESIDENCY_REGISTRY)
    if resident is not None:
        adapter.name, adapter.version = resident.name, resident.version
        adapter.digest, adapter.rank = resident.digest, resident.rank
        adapter.residency = _STATES[resident.state]
        adapter.pinned = resident.pinned
        adapter.device_bytes = resident.device_bytes
        adapter.num_pages = resident.num_pages
        adapter.num_running = resident.num_holders
    if version is not None:  # last: the same content may be published under two names
        adapter.name, adapter.version = version.name, version.version
        adapter.digest, adapter.rank = version.digest, version.rank
        adapter.aliases.extend(version.aliases)
        adapter.task = version.task_kind
    return adapter
