r"""What was decided about versions and aliases after they were made, as an append-only log of marks.

``<adapter>/marks.jsonl``, one mark a line, oldest first::

    {"at": "2026-11-22T10:00:00Z", "actor": "ada", "kind": "deprecate", "version": 3, "alias": null,
     "require": [], "reason": "wrong labels"}

==============  ========================================================================
``deprecate``   the version still resolves, and says so; ``restore`` takes it back
``delete``      the version's number is never used again, a ref to it says when and why
``protect``     moves of the alias must meet ``require``, or be forced; ``unprotect`` takes it back
==============  ========================================================================

The state is the log replayed. A line that a crash cut short has no newline: it was never acknowledged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from lorary.errors import AdapterNotFound, CorruptArtifact
from lorary.registry.durable import append_line, locked, storage_errors
from lorary.registry.strict_json import numbered_lines, parse_json

MarkKind = Literal["deprecate", "restore", "delete", "protect", "unprotect"]
_OF_ALIASES: Final = frozenset({"protect", "unprotect"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One decision.

    Attributes:
        at: when, UTC.
        actor: who.
        kind: what.
        version: of which version; ``None`` if it is about an alias.
        alias: of which alias; ``None`` if it is about a version.
        require: of ``protect``: what moves must meet (``requirements``).
        reason: why, as they said.
    """

    at: str
    actor: str
    kind: MarkKind
    version: int | None = None
    alias: str | None = None
    require: tuple[str, ...] = ()
    reason: str = ""

    def to_json(self) -> bytes:
        """Return the mark as a line of the log."""
        return (json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n").encode()

    def __str__(self) -> str:
        """Say who did it, when and why: ``on 2026-11-22T10:00:00Z by ada: wrong labels``."""
        return f"on {self.at} by {self.actor}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """All marks of one adapter, and what they come to.

    Attributes:
        entries: the log, oldest first.
        deprecated: by version: the mark that says so.
        deleted: by version: the mark that says so.
        protected: by alias: the mark that says so.
    """

    entries: tuple[Mark, ...] = ()
    deprecated: Mapping[int, Mark] = field(default_factory=dict)
    deleted: Mapping[int, Mark] = field(default_factory=dict)
    protected: Mapping[str, Mark] = field(default_factory=dict)

    def why_deprecated(self, version: int) -> str:
        """Return who deprecated a version, when and why; empty if nobody did."""
        mark = self.deprecated.get(version)
        return "" if mark is None else str(mark)

    def check_there(self, name: str, version: int) -> None:
        """Raise ``AdapterNotFound`` if a version was deleted."""
        mark = self.deleted.get(version)
        if mark is not None:
            raise AdapterNotFound(f"version {version} of adapter '{name}' was deleted {mark}")


NO_MARKS: Final = Marks()


class MarkLog:
    """The marks in one file. Reading is cached while the file's status is unchanged. Thread-safe."""

    def __init__(self, file: Path, lock: Path) -> None:
        self._file = file
        self._lock = lock
        self._cache: tuple[tuple[int, int, int], Marks] | None = None

    def marks(self) -> Marks:
        """Return all marks. One ``stat`` when nothing has changed."""
        with storage_errors(f"read {self._file}"):
            try:
                stat = self._file.stat()
            except FileNotFoundError:
                return NO_MARKS
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._cache is not None and self._cache[0] == stamp:
                return self._cache[1]
            raw = self._file.read_bytes()
        marks = parse_marks(raw, str(self._file))
        self._cache = (stamp, marks)
        return marks

    def append(self, mark: Mark, allow: Callable[[], None] | None = None) -> None:
        """Record a mark, unless ``allow`` raises, which is called when nobody can come before any more.

        Raises:
            CorruptArtifact: the log is damaged before its last line.
            StorageError: the log cannot be written.
        """
        with locked(self._lock):
            self.marks()
            if allow is not None:
                allow()
            with storage_errors(f"record a mark in {self._file}"):
                append_line(self._file, mark.to_json())


def replay_marks(entries: Iterable[Mark]) -> Marks:
    """Return what marks come to."""
    kept = tuple(entries)
    deprecated: dict[int, Mark] = {}
    deleted: dict[int, Mark] = {}
    protected: dict[str, Mark] = {}
    for mark in kept:
        if mark.version is not None:
            if mark.kind == "deprecate":
                deprecated[mark.version] = mark
            elif mark.kind == "restore":
                deprecated.pop(mark.version, None)
            else:
                deleted.setdefault(mark.version, mark)
        elif mark.alias is not None:
            if mark.kind == "protect":
                protected[mark.alias] = mark
            else:
                protected.pop(mark.alias, None)
    return Marks(entries=kept, deprecated=deprecated, deleted=deleted, protected=protected)


def parse_marks(raw: bytes, where: str) -> Marks:
    """Parse a log; a last line without a newline was never acknowledged and is skipped.

    Raises:
        CorruptArtifact: a line before the last is no mark.
    """
    return replay_marks(
        _mark(parse_json(line, place), place) for line, place in numbered_lines(raw, where)
    )


def _mark(fields: dict[str, Any], where: str) -> Mark:
    names = {field.name for field in dataclasses.fields(Mark)}
    texts = ("at", "actor", "kind", "reason")
    if (
        fields.keys() != names
        or not all(isinstance(fields[key], str) for key in texts)
        or fields["kind"] not in get_args(MarkKind)
        or not isinstance(fields["require"], list)
        or not all(isinstance(text, str) for text in fields["require"])
        or not _is_about(fields)
    ):
        raise CorruptArtifact(f"{where} is damaged; it is no mark")
    return Mark(**fields | {"require": tuple(fields["require"])})


def _is_about(fields: dict[str, Any]) -> bool:
    if fields["kind"] in _OF_ALIASES:
        return isinstance(fields["alias"], str) and fields["version"] is None
    return type(fields["version"]) is int and fields["alias"] is None
