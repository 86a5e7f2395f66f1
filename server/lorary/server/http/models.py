"""/v1/models: the base, and every adapter with its versions and aliases, as models to choose from."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from lorary.server.access.identity import may_use
from lorary.v1 import control_pb2

if TYPE_CHECKING:
    from lorary.server.answers import ServerFacts
    from lorary.server.control import ControlService
    from lorary.server.http.call import HttpCall
    from lorary.server.targets import Targets

_TIERS = {
    control_pb2.RESIDENCY_LOADING: "loading",
    control_pb2.RESIDENCY_RESIDENT: "resident",
    control_pb2.RESIDENCY_UNLOADING: "unloading",
}


class Models:
    """The two endpoints that list."""

    def __init__(self, control: ControlService, targets: Targets, facts: ServerFacts) -> None:
        self._control = control
        self._targets = targets
        self._facts = facts
        self._started = int(time.time())

    async def list(self, call: HttpCall) -> None:
        """Answer ``GET /v1/models``: the base, each adapter, and each of its aliases."""
        # Who lists reads the registry, and no context.
        request = control_pb2.ListAdaptersRequest()
        found = (await self._control.ListAdapters(request, None)).adapters
        listed = [adapter for adapter in found if may_use(adapter.name)]
        models = [self._model(self._facts.base)]
        for name, group in itertools.groupby(listed, key=lambda adapter: adapter.name):
            versions = list(group)
            models.append(self._model(name, {"versions": [version_of(v) for v in versions]}))
            models += [
                self._model(f"{name}@{alias}", version_of(version))
                for version in versions
                for alias in version.aliases
            ]
        await call.answer_json({"object": "list", "data": models})

    async def retrieve(self, call: HttpCall) -> None:
        """Answer ``GET /v1/models/{ref}``: what a ref means now.

        Raises:
            AdapterNotFound: there is no such version.
        """
        ref = call.path["ref"]
        if ref == self._facts.base:
            await call.answer_json(self._model(ref))
            return
        target = await self._targets.resolve(ref)
        task = target.task.kind if target.task is not None else ""
        found = {"version": target.version, "digest": target.digest, "task": task}
        await call.answer_json(self._model(ref, {"adapter": target.name, **found}))

    def _model(self, ref: str, lorary: dict[str, Any] | None = None) -> dict[str, Any]:
        is_base = lorary is None
        return {
            "id": ref,
            "object": "model",
            "created": self._started,
            "owned_by": "lorary",
            "root": self._facts.base,
            "parent": None if is_base else self._facts.base,
            "max_model_len": self._facts.max_context,
            "lorary": lorary or {"base_fingerprint": self._facts.base_fingerprint},
        }


def version_of(adapter: control_pb2.Adapter) -> dict[str, Any]:
    """Return what any caller who may use a version is told of it."""
    return {
        "version": adapter.version,
        "digest": adapter.digest,
        "aliases": sorted(adapter.aliases),
        "rank": adapter.rank,
        "task": adapter.task,
        "residency": _TIERS.get(adapter.residency, "registry"),
        "pinned": adapter.pinned,
    }
