"""Aliases, as admins see and move them: what moved when, promote, roll back.

Every move names where the page saw the alias. If somebody was faster, nothing is changed and the mover is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.errors import AdapterNotFound, InvalidRequest
from lorary.registry.aliases import before, replay
from lorary.registry.splits import replay_splits
from lorary.server.http.body import Fields
from lorary.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.registry.aliases import AliasMove
    from lorary.server.control import ControlService
    from lorary.server.ports import RegistryLike
    from lorary.server.targets import Targets

MAX_MOVES = 100
"""Lines of a log that are shown, the newest."""
MAX_REASON = 500


class Moves:
    """The log of an adapter's aliases, and its next line.

    Args:
        control: moves them.
        targets: runs what reads the registry.
        registry: keeps the log.
    """

    def __init__(self, control: ControlService, targets: Targets, registry: RegistryLike) -> None:
        self._control = control
        self._targets = targets
        self._registry = registry

    async def log(self, name: str) -> dict[str, Any]:
        """Return where every alias points, where it would roll back to, and the last moves, newest first.

        Raises:
            AdapterNotFound: there is no such adapter.
        """
        moves = await self._targets.run(self._registry.log, name)
        splits = replay_splits(moves)
        aliases = {
            alias: {
                "version": version,
                "before": _before(moves, alias),
                "canary": splits[alias].canary.version if alias in splits else None,
            }
            for alias, version in sorted(replay(moves).items())
        }
        shown = [_told(move) for move in reversed(moves[-MAX_MOVES:])]
        return {"name": name, "aliases": aliases, "moves": shown}

    async def promote(self, members: Mapping[str, Any]) -> dict[str, Any]:
        """Point an alias at a version, if it still points where the page saw it (0: nowhere).

        Raises:
            InvalidRequest: a member is missing, of the wrong type, or unknown.
            AdapterNotFound: there is no such version.
            Conflict: the alias is elsewhere by now.
            Refused: it is protected, and the version does not meet what is asked of it.
        """
        fields = Fields(members)
        request = pb.SetAliasRequest(
            name=_text(fields, "name"),
            alias=_text(fields, "alias"),
            version=_version(fields, "version", low=1),
            expect_version=_version(fields, "expect_version", low=0),
            reason=_reason(fields),
        )
        fields.finish()
        return _moved(await self._control.SetAlias(request, None))

    async def roll_back(self, members: Mapping[str, Any]) -> dict[str, Any]:
        """Return an alias to where it pointed before, or end its canary; raises as ``promote``."""
        fields = Fields(members)
        name, alias = _text(fields, "name"), _text(fields, "alias")
        expect = _version(fields, "expect_version", low=1)
        reason = _reason(fields)
        fields.finish()
        return _moved(
            await self._control.roll_back(name, alias, expect_version=expect, reason=reason)
        )


def _before(moves: Sequence[AliasMove], alias: str) -> int | None:
    try:
        return before(moves, alias)[1]
    except AdapterNotFound:
        return None  # it has never been elsewhere


def _told(move: AliasMove) -> dict[str, Any]:
    return {
        "at": move.at,
        "actor": move.actor,
        "alias": move.alias,
        "from_version": move.from_version,
        "to_version": move.to_version,
        "reason": move.reason,
        "kind": move.kind,
        "canary": move.canary.version if move.canary is not None else None,
    }


def _moved(response: pb.SetAliasResponse) -> dict[str, Any]:
    return {"from_version": response.from_version, "to_version": response.to_version}


def _text(fields: Fields, name: str) -> str:
    value = fields.text(name)
    if not value:
        raise fields.error(name, f"{name} is missing; send it as a string.")
    return value


def _version(fields: Fields, name: str, *, low: int) -> int:
    value = fields.integer(name)
    if value is None or not low <= value < 2**32:
        raise fields.error(name, f"{name} is {value}; send a version's number, from {low}.")
    return value


def _reason(fields: Fields) -> str:
    reason = fields.text("reason") or ""
    if len(reason) > MAX_REASON:
        raise InvalidRequest(
            f"reason has {len(reason)} characters; at most {MAX_REASON} are kept.", field="reason"
        )
    return reason
