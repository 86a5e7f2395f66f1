"""Calls about adapters on the device and versions under traffic, for both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from lorary.client import messages as m
from lorary.client.failures import from_rpc_error
from lorary.client.results import AdapterEvent, EventsLost, RolloutInfo, Snapshot
from lorary.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from lorary.client.results import AdapterInfo


class ControlCalls:
    """What ``Client`` can ask of the control plane beside list, load and unload."""

    target: str
    _control: Any

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        raise NotImplementedError

    def snapshot(self, *, resident_only: bool = True, timeout_s: float | None = None) -> Snapshot:
        """Return adapters, canaries, and what ails the registry."""
        request = pb.ListAdaptersRequest(resident_only=resident_only)
        return snapshot(self._call(self._control.ListAdapters, request, timeout_s))

    def get_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Return one version and its state."""
        request = pb.GetAdapterRequest(adapter=adapter)
        return m.adapter_info(self._call(self._control.GetAdapter, request, timeout_s).adapter)

    def prefetch_adapter(
        self, adapter: str, *, wait: bool = False, timeout_s: float | None = None
    ) -> AdapterInfo:
        """Begin to load a version and return at once, or with ``wait`` when it is there."""
        request = pb.PrefetchAdapterRequest(adapter=adapter, wait=wait)
        return m.adapter_info(self._call(self._control.PrefetchAdapter, request, timeout_s).adapter)

    def pin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Keep a resident version from being evicted."""
        request = pb.PinAdapterRequest(adapter=adapter)
        return m.adapter_info(self._call(self._control.PinAdapter, request, timeout_s).adapter)

    def unpin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Let a version be evicted again."""
        request = pb.UnpinAdapterRequest(adapter=adapter)
        return m.adapter_info(self._call(self._control.UnpinAdapter, request, timeout_s).adapter)

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expect: int | None = None,
        reason: str = "",
        actor: str = "",
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Point an alias at a version in the server's registry; 0 removes it.

        Args:
            name: the adapter.
            alias: the alias.
            version: where it shall point.
            expect: where it must point, 0 for nowhere; wherever if ``None``.
            reason: for the log.
            actor: who, for the log; the server if empty.
            timeout_s: deadline of this call.

        Returns:
            Where it pointed and where it points; 0 is nowhere.

        Raises:
            Conflict: it is not where ``expect`` says.
        """
        request = set_alias_request(name, alias, version, expect, reason, actor)
        answer = self._call(self._control.SetAlias, request, timeout_s)
        return answer.from_version, answer.to_version

    def watch(
        self, *, timeout_s: float | None = None
    ) -> Iterator[Snapshot | AdapterEvent | EventsLost]:
        """Yield a snapshot, then what happens, until the loop is left.

        After ``EventsLost`` (this side read too slowly) a new snapshot follows.
        """
        call = self._control.Watch(pb.WatchRequest(), timeout=timeout_s)
        try:
            for message in call:
                yield watched(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error
        finally:
            call.cancel()


class AsyncControlCalls:
    """The same for ``AsyncClient``; see ``ControlCalls``."""

    target: str
    _control: Any

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        raise NotImplementedError

    async def snapshot(
        self, *, resident_only: bool = True, timeout_s: float | None = None
    ) -> Snapshot:
        """Return adapters, canaries, and what ails the registry."""
        request = pb.ListAdaptersRequest(resident_only=resident_only)
        return snapshot(await self._call(self._control.ListAdapters, request, timeout_s))

    async def get_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Return one version and its state."""
        request = pb.GetAdapterRequest(adapter=adapter)
        answer = await self._call(self._control.GetAdapter, request, timeout_s)
        return m.adapter_info(answer.adapter)

    async def prefetch_adapter(
        self, adapter: str, *, wait: bool = False, timeout_s: float | None = None
    ) -> AdapterInfo:
        """Begin to load a version and return at once, or with ``wait`` when it is there."""
        request = pb.PrefetchAdapterRequest(adapter=adapter, wait=wait)
        answer = await self._call(self._control.PrefetchAdapter, request, timeout_s)
        return m.adapter_info(answer.adapter)

    async def pin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Keep a resident version from being evicted."""
        request = pb.PinAdapterRequest(adapter=adapter)
        answer = await self._call(self._control.PinAdapter, request, timeout_s)
        return m.adapter_info(answer.adapter)

    async def unpin_adapter(self, adapter: str, *, timeout_s: float | None = None) -> AdapterInfo:
        """Let a version be evicted again."""
        request = pb.UnpinAdapterRequest(adapter=adapter)
        answer = await self._call(self._control.UnpinAdapter, request, timeout_s)
        return m.adapter_info(answer.adapter)

    async def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expect: int | None = None,
        reason: str = "",
        actor: str = "",
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Point an alias at a version in the server's registry; see ``ControlCalls.set_alias``."""
        request = set_alias_request(name, alias, version, expect, reason, actor)
        answer = await self._call(self._control.SetAlias, request, timeout_s)
        return answer.from_version, answer.to_version

    async def watch(
        self, *, timeout_s: float | None = None
    ) -> AsyncIterator[Snapshot | AdapterEvent | EventsLost]:
        """Yield a snapshot, then what happens; see ``ControlCalls.watch``."""
        call = self._control.Watch(pb.WatchRequest(), timeout=timeout_s)
        try:
            async for message in call:
                yield watched(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.target) from error
        finally:
            call.cancel()


def set_alias_request(
    name: str, alias: str, version: int, expect: int | None, reason: str, actor: str
) -> pb.SetAliasRequest:
    """Return the request to move an alias."""
    request = pb.SetAliasRequest(
        name=name, alias=alias, version=version, reason=reason, actor=actor
    )
    if expect is not None:
        request.expect_version = expect
    return request


def snapshot(message: pb.ListAdaptersResponse) -> Snapshot:
    """Return what a list says."""
    return Snapshot(
        adapters=tuple(m.adapter_info(adapter) for adapter in message.adapters),
        rollouts=tuple(_rollout(one) for one in message.rollouts),
        behind={one.ref: one.reason for one in message.behind},
        registry_trouble=message.registry_trouble,
    )


def watched(message: pb.WatchResponse) -> Snapshot | AdapterEvent | EventsLost:
    """Return what one message of a watch says."""
    what = message.WhichOneof("what")
    if what == "snapshot":
        return snapshot(message.snapshot)
    if what == "num_lost":
        return EventsLost(num_lost=message.num_lost)
    event = message.event
    return AdapterEvent(
        kind=pb.EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower(),
        name=event.name,
        version=event.version,
        digest=event.digest,
        alias=event.alias,
        detail=event.detail,
        at_s=event.at_unix_ms / 1000,
    )


def _rollout(message: pb.Rollout) -> RolloutInfo:
    return RolloutInfo(
        name=message.name,
        alias=message.alias,
        holder_version=message.holder_version,
        canary_version=message.canary_version,
        percent=message.percent,
        shadow=message.shadow,
        state=message.state,
        problem=message.problem,
        holder_calls=message.holder.num_calls,
        holder_errors=message.holder.num_errors,
        holder_p95_s=message.holder.first_token_p95_s,
        canary_calls=message.canary.num_calls,
        canary_errors=message.canary.num_errors,
        canary_p95_s=message.canary.first_token_p95_s,
        num_compared=message.num_compared,
        num_same=message.num_same,
        divergence=message.divergence,
        since=message.since,
    )
