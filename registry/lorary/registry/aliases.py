r"""Movable aliases of one adapter, as an append-only log of moves.

``<adapter>/aliases.jsonl``, one move a line, oldest first::

    {"at": "2026-11-22T10:00:00Z", "actor": "ada", "alias": "prod", "from_version": 2,
     "to_version": 3, "reason": "better F1", "kind": "set"}

A move that had to meet requirements says so in a further field, ``figures`` (``requirements``); one
that went through without them has ``"forced": true``. A line of kind ``canary`` leaves the alias where it
is and says who shares its calls (``splits``).

The state is the log replayed. A move is appended and synced under a lock between processes, after the
alias was compared with what the mover expected. A line that a crash cut short has no newline: it was
never acknowledged, readers skip it and the next writer cuts it off.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from lorary.errors import AdapterNotFound, Conflict, CorruptArtifact, StorageError
from lorary.registry.durable import append_line, locked, storage_errors, sync_file
from lorary.registry.requirements import Figure, parse_figures
from lorary.registry.splits import Canary, Split, is_change, parse_canary, replay_splits
from lorary.registry.strict_json import numbered_lines, parse_json

MoveKind = Literal["set", "rollback", "canary"]
_OPTIONAL: Final = frozenset({"figures", "forced"})


class Unset:
    """The type of ``UNSET``."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()
"""Says that the mover expects nothing in particular; ``None`` says that the alias must not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasMove:
    """One move of an alias.

    Attributes:
        at: when, UTC.
        actor: who.
        alias: which alias.
        from_version: where it pointed, ``None`` if it did not exist.
        to_version: where it points now, ``None`` if it was removed.
        reason: why, as the mover said.
        kind: ``set``; ``rollback`` for a return to where it pointed before; ``canary`` for the
            beginning, change or end of a canary.
        figures: the requirements that were asked for, each with what it compared.
        forced: whether it went through although the alias is protected.
        canary: who shares the alias's calls from here on, ``None`` for nobody.
    """

    at: str
    actor: str
    alias: str
    from_version: int | None
    to_version: int | None
    reason: str = ""
    kind: MoveKind = "set"
    figures: tuple[Figure, ...] = ()
    forced: bool = False
    canary: Canary | None = None

    def to_json(self) -> bytes:
        """Return the move as a line of the log; what only some moves have is left out of the others."""
        fields = {**dataclasses.asdict(self), "canary": self.canary and self.canary.to_dict()}
        if self.kind != "canary":
            del fields["canary"]
        said = {key: value for key, value in fields.items() if key not in _OPTIONAL or value}
        return (json.dumps(said, ensure_ascii=False) + "\n").encode()


Admit = Callable[[AliasMove], AliasMove]
"""Given a move that nobody can come before any more; returns it as it is to be recorded, or raises."""


class AliasLog:
    """The alias log in one file. Reading is cached while the file's status is unchanged. Thread-safe."""

    __slots__ = ("_cache", "_file", "_lock", "_path")

    def __init__(self, file: Path, lock: Path) -> None:
        self._file = file
        self._path = str(file)
        self._lock = lock
        self._cache: tuple[tuple[int, int, int], _Replayed] | None = None

    def state(self) -> dict[str, int]:
        """Return where every alias points. One ``stat`` when nothing has changed; do not mutate it."""
        return self._load().state

    def splits(self) -> dict[str, Split]:
        """Return the canaries that run, by alias; as ``state``."""
        return self._load().splits

    def moves(self) -> tuple[AliasMove, ...]:
        """Return all moves, oldest first."""
        return self._load().moves

    def append(
        self,
        move: AliasMove,
        *,
        expect: int | Unset | None,
        expect_serial: int | None = None,
        admit: Admit | None = None,
    ) -> AliasMove:
        """Record ``move`` if the alias is where ``expect`` says; ``from_version`` is filled in.

        A move to where the alias points already changes nothing and is not recorded. With
        ``expect_serial``, that canary must run.

        Raises:
            Conflict: the alias is elsewhere, or the canary another.
            LoraryError: ``admit`` raised it.
            CorruptArtifact: the log is damaged before its last line.
            StorageError: the log cannot be written.
        """
        with locked(self._lock):
            known = self._load()
            move = compared(move, known.state, expect)
            if admit is not None:
                move = admit(move)
            with storage_errors(f"record a move in {self._file}"):
                if is_change(move, known.splits, expect_serial):
                    append_line(self._file, move.to_json())
                elif self._file.exists():
                    sync_file(self._file)  # who moved it there may have died before it could
            return move

    def _load(self) -> _Replayed:
        # Outside of storage_errors, which takes as long as the look itself: servers do this in every call.
        try:
            stat = os.stat(self._path)
        except FileNotFoundError:
            return _Replayed()
        except OSError as error:
            raise StorageError(f"cannot read {self._file}: {error.strerror or error}") from error
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._cache is not None and self._cache[0] == stamp:
            return self._cache[1]
        with storage_errors(f"read {self._file}"):
            raw = self._file.read_bytes()
        moves = parse_moves(raw, str(self._file))
        known = _Replayed(moves, replay(moves), replay_splits(moves))
        self._cache = (stamp, known)
        return known


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A log, and what follows from it."""

    moves: tuple[AliasMove, ...] = ()
    state: dict[str, int] = dataclasses.field(default_factory=dict)
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)


def compared(move: AliasMove, state: Mapping[str, int], expect: int | Unset | None) -> AliasMove:
    """Return ``move`` with ``from_version`` filled in, if the alias is where ``expect`` says.

    Raises:
        Conflict: it is elsewhere.
    """
    current = state.get(move.alias)
    check_expected(move.alias, current, expect)
    return dataclasses.replace(move, from_version=current)


def check_expected(alias: str, current: int | None, expect: int | Unset | None) -> None:
    """Check that an alias is where its mover expects it.

    Raises:
        Conflict: it is elsewhere.
    """
    if not isinstance(expect, Unset) and current != expect:
        raise Conflict(
            f"alias '{alias}' points at {_shown(current)}, not at {_shown(expect)}: "
            "somebody moved it first, and nothing was changed. Look at the log and retry."
        )


def replay(moves: Iterable[AliasMove]) -> dict[str, int]:
    """Return where every alias points after ``moves``."""
    state: dict[str, int] = {}
    for move in moves:
        if move.to_version is None:
            state.pop(move.alias, None)
        else:
            state[move.alias] = move.to_version
    return state


def before(moves: Iterable[AliasMove], alias: str) -> tuple[int, int | None]:
    """Return where ``alias`` points and where it pointed before; repeated rollbacks go further back.

    Raises:
        AdapterNotFound: it has never pointed anywhere else.
    """
    history: list[int | None] = []
    for move in moves:
        if move.alias != alias or move.from_version == move.to_version:
            continue  # another alias's, or a canary's beginning or end
        if move.kind == "rollback":
            history.pop()
        else:
            history.append(move.to_version)
    if not history or history[-1] is None:
        raise AdapterNotFound(f"there is no alias '{alias}' to roll back")
    if len(history) < 2:
        raise AdapterNotFound(
            f"alias '{alias}' has pointed at version {history[-1]} from the beginning; "
            "there is nothing to roll back to"
        )
    return history[-1], history[-2]


def parse_moves(raw: bytes, where: str) -> tuple[AliasMove, ...]:
    """Parse a log; a last line without a newline was never acknowledged and is skipped.

    Raises:
        CorruptArtifact: a line before the last is no move.
    """
    return tuple(
        _move(parse_json(line, place), place) for line, place in numbered_lines(raw, where)
    )


def _move(fields: dict[str, Any], where: str) -> AliasMove:
    texts = ("at", "actor", "alias", "reason", "kind")
    versions = ("from_version", "to_version")
    needed = {*texts, *versions}
    is_canary = fields.get("kind") == "canary"
    if is_canary:
        needed.add("canary")
    if (
        not needed <= fields.keys() <= needed | _OPTIONAL
        or not all(isinstance(fields[key], str) for key in texts)
        or not all(fields[key] is None or type(fields[key]) is int for key in versions)
        or fields["kind"] not in get_args(MoveKind)
        or type(fields.get("forced", False)) is not bool
    ):
        raise CorruptArtifact(f"{where} is damaged; it is no move of an alias")
    found = {**fields, "figures": parse_figures(fields.get("figures", []), where)}
    if not is_canary:
        return AliasMove(**found)
    if fields["to_version"] is None or fields["from_version"] != fields["to_version"]:
        raise CorruptArtifact(f"{where} is damaged; a canary does not move its alias")
    return AliasMove(**{**found, "canary": parse_canary(fields["canary"], where)})


def _shown(version: int | Unset | None) -> str:
    return "nothing" if version is None else f"version {version}"
