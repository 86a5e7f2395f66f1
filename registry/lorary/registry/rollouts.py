"""Canaries of one registry: begin, end, promote; every change is a line in the alias log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from lorary.errors import AdapterNotFound, InvalidRequest
from lorary.registry.aliases import AliasMove, MoveKind
from lorary.registry.backend import Store
from lorary.registry.gates import gate
from lorary.registry.splits import Canary, Split

PROMOTED: Final = "promoted the canary"


class Rollouts:
    """The canaries of a registry's aliases.

    Args:
        store: where they are kept.
        describe: makes the move that ``move_alias`` records: alias, version, reason, actor, kind.
    """

    def __init__(self, store: Store, describe: Callable[..., AliasMove]) -> None:
        self._store = store
        self._describe = describe

    def all(self, name: str) -> Mapping[str, Split]:
        """Return the canaries of an adapter that run, by alias; do not mutate it."""
        return self._store.alias_splits(name)

    def of(self, name: str, alias: str) -> Split | None:
        """Return the canary of an alias, if one runs."""
        return self.all(name).get(alias)

    def start(
        self, name: str, alias: str, canary: Canary, *, reason: str = "", actor: str = ""
    ) -> AliasMove:
        """Begin a canary, or replace the one that runs.

        Raises:
            AdapterNotFound: no such adapter, alias or version.
            InvalidRequest: the alias points at that version already.
            Refused: the alias is protected, and the version does not meet its requirements.
            Conflict: somebody moved the alias meanwhile.
        """
        holder = self._holder(name, alias)
        if self._store.pointer(name, canary.version) is None:
            raise AdapterNotFound(
                f"adapter '{name}' has no version {canary.version}; it has 1 to "
                f"{self._store.newest(name)}"
            )
        if holder == canary.version:
            raise InvalidRequest(
                f"alias '{alias}' points at version {holder} already; a canary is another version",
                field="version",
            )
        move = self._describe(
            alias, holder, reason=reason, actor=actor, kind="canary", canary=canary
        )
        return self._store.move_alias(name, move, expect=holder, admit=gate(self._store, name))

    def stop(
        self,
        name: str,
        alias: str,
        *,
        expect: Split | None = None,
        reason: str = "",
        actor: str = "",
        kind: MoveKind = "canary",
    ) -> AliasMove:
        """End a canary; its alias stays where it is.

        Args:
            name: the adapter.
            alias: whose canary.
            expect: the canary that is meant; whichever runs if ``None``.
            reason: for the log.
            actor: who; the system's user if empty.
            kind: ``canary``, or ``rollback`` when somebody undoes its start.

        Raises:
            AdapterNotFound: no such adapter or alias, or no canary runs.
            Conflict: another canary runs than the one that is meant, or the alias was moved.
        """
        split = expect or self._running(name, alias)
        move = self._describe(alias, split.version, reason=reason, actor=actor, kind=kind)
        return self._end(name, split, move)

    def promote(
        self,
        name: str,
        alias: str,
        *,
        expect: Split | None = None,
        reason: str = "",
        actor: str = "",
    ) -> AliasMove:
        """Point the alias at its canary, which ends it; raises as ``stop``."""
        split = expect or self._running(name, alias)
        move = self._describe(
            alias, split.canary.version, reason=reason or PROMOTED, actor=actor, kind="set"
        )
        return self._end(name, split, move)

    def _end(self, name: str, split: Split, move: AliasMove) -> AliasMove:
        """Record a move that ends a canary, if it is still that one which runs."""
        return self._store.move_alias(
            name,
            move,
            expect=split.version,
            expect_serial=split.serial,
            admit=gate(self._store, name),
        )

    def _holder(self, name: str, alias: str) -> int:
        if not self._store.newest(name):
            raise AdapterNotFound(f"adapter '{name}' is not in the registry")
        holder = self._store.alias_state(name).get(alias)
        if holder is None:
            raise AdapterNotFound(
                f"adapter '{name}' has no alias '{alias}' that a canary could share the calls of; "
                f"set it first: registry alias {name} {alias} VERSION"
            )
        return holder

    def _running(self, name: str, alias: str) -> Split:
        self._holder(name, alias)
        split = self.of(name, alias)
        if split is None:
            raise AdapterNotFound(f"alias '{alias}' of '{name}' has no canary")
        return split
