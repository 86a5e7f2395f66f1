"""What the console shows: the server, the adapters that the caller may see, and, to admins, their traffic."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lorary.server.access.identity import is_admin, may_use, tenant_name
from lorary.server.http.models import version_of
from lorary.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from lorary.server.control import ControlService
    from lorary.server.service import Parts


class View:
    """Tells the state of everything.

    Args:
        control: lists adapters.
        parts: what the server is made of.
        has_tenants: whether callers are asked who they are.
    """

    def __init__(self, control: ControlService, parts: Parts, *, has_tenants: bool) -> None:
        self._control = control
        self._parts = parts
        self._has_tenants = has_tenants

    async def state(self) -> dict[str, Any]:
        """Return it, as far as the current caller may know it.

        A user sees what ``/v1/models`` shows: versions, aliases and where they are. How much each is called
        tells of the others, so that is for admins.
        """
        # Who lists reads the registry, and no context.
        found = await self._control.ListAdapters(pb.ListAdaptersRequest(), None)
        listed = [adapter for adapter in found.adapters if may_use(adapter.name)]
        tell = self._all_of if is_admin() else version_of
        adapters = [
            {"name": name, "versions": [tell(version) for version in versions]}
            for name, versions in itertools.groupby(listed, key=lambda adapter: adapter.name)
        ]
        state = {"caller": self._caller(), "server": self._server(), "adapters": adapters}
        if is_admin():
            state |= {
                "rollouts": [_rollout(one) for one in found.rollouts],
                "behind": [
                    {"ref": one.ref, "version": one.version, "reason": one.reason}
                    for one in found.behind
                ],
                "trouble": found.registry_trouble,
            }
        return state

    def _caller(self) -> dict[str, Any]:
        role = "admin" if is_admin() else "user"
        return {"name": tenant_name(), "role": role, "has_token": self._has_tenants}

    def _server(self) -> dict[str, Any]:
        facts = self._parts.facts
        return {
            "version": facts.version,
            "base": facts.base,
            "base_fingerprint": facts.base_fingerprint,
            "quantization": facts.quantization,
            "device": facts.device,
            "dtype": facts.dtype,
            "max_context": facts.max_context,
            "max_batch": facts.max_batch,
            "adapter_memory_bytes": facts.adapter_memory_bytes,
        }

    def _all_of(self, adapter: pb.Adapter) -> dict[str, Any]:
        """Return what an admin is told of a version: what ``lorary ps`` shows, and copies in host memory."""
        told = version_of(adapter)
        if adapter.residency == pb.RESIDENCY_REGISTRY and self._parts.residency.has_copy(
            adapter.digest
        ):
            told["residency"] = "host"
        return {
            **told,
            "quarantined": adapter.quarantined,
            "num_pages": adapter.num_pages,
            "device_bytes": adapter.device_bytes,
            "num_running": adapter.num_running,
            "num_served": adapter.num_served,
            "last_used_ms": adapter.last_used_unix_ms,
            "verified": adapter.verified,
            "verified_divergence": adapter.verified_divergence,
            "verified_limit": adapter.verified_limit,
            "canaries": [
                {"alias": one.alias, "percent": one.percent, "shadow": one.shadow}
                for one in adapter.canaries
            ],
        }


def _rollout(rollout: pb.Rollout) -> dict[str, Any]:
    return {
        "ref": f"{rollout.name}@{rollout.alias}",
        "holder_version": rollout.holder_version,
        "canary_version": rollout.canary_version,
        "percent": rollout.percent,
        "shadow": rollout.shadow,
        "state": rollout.state,
        "problem": rollout.problem,
        "holder": _tally(rollout.holder),
        "canary": _tally(rollout.canary),
    }


def _tally(tally: pb.CallTally) -> dict[str, Any]:
    return {"calls": tally.num_calls, "errors": tally.num_errors, "p95_s": tally.first_token_p95_s}
