r"""Who did what to one adapter: an append-only log of every change, each line chained to the one before.

``<adapter>/audit.jsonl``, one event a line, oldest first::

    {"at": "2026-11-22T10:00:00Z", "actor": "ada", "event": "alias", "subject": "prod", "before": "2",
     "after": "3", "reason": "better F1", "evidence": "{…}", "versions": 3, "moves": 2, "marks": 0,
     "previous": "5e1f…"}

``previous`` is the sha256 of the line before, so a line that is changed, taken out or put in breaks
the chain there. Who may write the file can write all of it anew: keep the newest line's sha256 (its
*head*) elsewhere to notice that, too.

A change counts when its version file, or its line in the log of aliases or of marks, is there.
``versions``, ``moves`` and ``marks`` say how many of each are in the log so far; whatever a killed
process did not come to record is recorded before the next change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from lorary.errors import CorruptArtifact
from lorary.registry.aliases import AliasMove, MoveKind
from lorary.registry.durable import append_lines, storage_errors
from lorary.registry.marks import Mark, MarkKind
from lorary.registry.strict_json import numbered_lines, parse_json
from lorary.registry.versions import Pointer

AUDIT_FILE: Final = "audit.jsonl"
_START: Final = "0" * 64
_TAIL_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One change.

    Attributes:
        at: when, UTC.
        actor: who; empty when whoever it was died before saying so.
        event: ``push``, ``alias``, ``rollback``, ``sign``, ``repair`` …
        subject: what was changed: a version's number, or an alias.
        before: what it was before; empty for nothing.
        after: what it is now; empty for nothing. For a push, the digest.
        reason: why, as the actor said.
        evidence: what proves it: for a push the sha256 of the manifest, for a move or a mark its line;
            on a Hub the commit.
        versions: how many versions the log knows of, with this event.
        moves: how many moves of aliases the log knows of, with this event.
        marks: how many marks the log knows of, with this event.
        previous: sha256 of the line before, 64 zeros at the beginning.
    """

    at: str
    actor: str
    event: str
    subject: str
    before: str = ""
    after: str = ""
    reason: str = ""
    evidence: str = ""
    versions: int = 0
    moves: int = 0
    marks: int = 0
    previous: str = _START

    def to_json(self) -> bytes:
        """Return the event as a line of the log."""
        return (json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n").encode()

    @property
    def sha256(self) -> str:
        """What the next line names as its ``previous``; the log's head, if this is the last."""
        return hashlib.sha256(self.to_json()).hexdigest()


_COUNTS: Final = ("versions", "moves", "marks")
_TEXTS: Final = {f.name for f in dataclasses.fields(AuditEvent)} - {*_COUNTS}


class AuditLog:
    """The audit log in one file. Whoever appends holds the adapter's lock."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def events(self) -> tuple[AuditEvent, ...]:
        """Return all events, oldest first.

        Raises:
            CorruptArtifact: a line is damaged, or the chain is broken.
            StorageError: the log cannot be read.
        """
        with storage_errors(f"read {self._file}"):
            try:
                raw = self._file.read_bytes()
            except FileNotFoundError:
                return ()
        return parse_audit(raw, str(self._file))

    def last(self) -> AuditEvent | None:
        """Return the newest event; reads the end of the file only.

        Raises:
            CorruptArtifact: the newest line is damaged.
            StorageError: the log cannot be read.
        """
        with storage_errors(f"read {self._file}"):
            try:
                with self._file.open("rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(max(0, size - _TAIL_BYTES))
                    lines = file.read().split(b"\n")
            except FileNotFoundError:
                return None
        return _event(lines[-2], f"the last line of {self._file}") if len(lines) > 1 else None

    def append(self, events: Iterable[AuditEvent]) -> None:
        """Chain events to the log and sync it; ``previous`` is filled in.

        Raises:
            CorruptArtifact: the newest line is damaged.
            StorageError: the log cannot be written.
        """
        last = self.last()
        previous, lines = last.sha256 if last else _START, []
        for event in events:
            chained = dataclasses.replace(event, previous=previous)
            previous = chained.sha256
            lines.append(chained.to_json())
        if lines:
            with storage_errors(f"record a change in {self._file}"):
                append_lines(self._file, lines)


def unrecorded(
    last: AuditEvent | None,
    pointers: Iterable[Pointer],
    moves: Sequence[AliasMove],
    marks: Sequence[Mark],
    *,
    pusher: str = "",
    pushed: int = 0,
) -> list[AuditEvent]:
    """Return the events of versions, moves and marks that the log does not have yet.

    Args:
        last: the log's newest event.
        pointers: the versions, oldest first.
        moves: all moves of aliases, oldest first.
        marks: all marks, oldest first.
        pusher: who made version ``pushed``; who made others is not known.
        pushed: a version's number.
    """
    versions, num_moves, num_marks = (last.versions, last.moves, last.marks) if last else (0, 0, 0)
    events = []
    for pointer in pointers:
        if pointer.version > versions:
            versions = pointer.version
            events.append(
                AuditEvent(
                    at=pointer.created_at,
                    actor=pusher if pointer.version == pushed else "",
                    event="push",
                    subject=str(pointer.version),
                    after=pointer.digest,
                    evidence=pointer.manifest_sha256,
                    versions=versions,
                    moves=num_moves,
                    marks=num_marks,
                )
            )
    for move in moves[num_moves:]:
        num_moves += 1
        events.append(
            dataclasses.replace(of_move(move), versions=versions, moves=num_moves, marks=num_marks)
        )
    for mark in marks[num_marks:]:
        num_marks += 1
        events.append(
            dataclasses.replace(of_mark(mark), versions=versions, moves=num_moves, marks=num_marks)
        )
    return events


MOVES: Final = frozenset({"alias", *get_args(MoveKind)} - {"set"})
"""What moves of aliases are called."""
MARKS: Final = frozenset(get_args(MarkKind))
"""What marks are called."""


def of_move(move: AliasMove) -> AuditEvent:
    """Return a move of an alias as an event."""
    return AuditEvent(
        at=move.at,
        actor=move.actor,
        event="alias" if move.kind == "set" else move.kind,
        subject=move.alias,
        before="" if move.from_version is None else str(move.from_version),
        after="" if move.to_version is None else str(move.to_version),
        reason=move.reason,
        evidence=_line(move.to_json()),
    )


def of_mark(mark: Mark) -> AuditEvent:
    """Return a mark as an event."""
    return AuditEvent(
        at=mark.at,
        actor=mark.actor,
        event=mark.kind,
        subject=str(mark.version if mark.alias is None else mark.alias),
        after=", ".join(mark.require),
        reason=mark.reason,
        evidence=_line(mark.to_json()),
    )


def _line(raw: bytes) -> str:
    return raw.decode().rstrip("\n")


def signed(version: int, signature: bytes, actor: str, at: str) -> AuditEvent:
    """Return a signature as an event."""
    sha256 = hashlib.sha256(signature).hexdigest()
    return AuditEvent(
        at=at, actor=actor, event="sign", subject=str(version), after="signed", evidence=sha256
    )


def parse_audit(raw: bytes, where: str) -> tuple[AuditEvent, ...]:
    """Parse a log and check its chain; a last line without a newline is skipped.

    Raises:
        CorruptArtifact: a line is damaged, or was changed, added or taken out.
    """
    events: list[AuditEvent] = []
    previous = _START
    for line, place in numbered_lines(raw, where):
        event = _event(line, place)
        if event.previous != previous:
            raise CorruptArtifact(
                f"{place} does not follow the line before it: a line was changed, added or taken out"
            )
        previous = hashlib.sha256(line + b"\n").hexdigest()
        events.append(event)
    return tuple(events)


def _event(line: bytes, where: str) -> AuditEvent:
    fields = parse_json(line, where)
    if (
        fields.keys() != {*_TEXTS, *_COUNTS}
        or not all(isinstance(fields[key], str) for key in _TEXTS)
        or not all(type(fields[key]) is int for key in _COUNTS)
    ):
        raise CorruptArtifact(f"{where} is damaged; it is no event of an audit log")
    return AuditEvent(**fields)
