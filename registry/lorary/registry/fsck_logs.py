"""Does a log of moves or of marks add up? Its lines, one after the other, and beside the audit log."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from lorary.errors import CorruptArtifact
from lorary.registry.aliases import AliasMove, parse_moves
from lorary.registry.audit import MARKS, MOVES, AuditEvent
from lorary.registry.marks import parse_marks

T = TypeVar("T")
Checked = tuple[list[str], tuple[bytes, ...] | None]
"""What is wrong, and the lines as they were written, None where nothing tells."""


def check_moves(raw: bytes, audit: Sequence[AuditEvent]) -> Checked:
    """Compare an alias log with itself and with the audit log.

    Args:
        raw: the log.
        audit: the adapter's audit log, whole; empty if there is none.
    """
    state: dict[str, int | None] = {}

    def problem(move: AliasMove) -> str:
        if move.from_version != state.get(move.alias):
            return f"moves '{move.alias}' from where it was not"
        return ""

    def follow(move: AliasMove) -> None:
        state[move.alias] = move.to_version

    return _check(raw, audit, MOVES, lambda line: parse_moves(line, "")[0], problem, follow)


def check_marks(raw: bytes, audit: Sequence[AuditEvent]) -> Checked:
    """Compare a log of marks with the audit log; as ``check_moves``."""

    def parse(line: bytes) -> object:
        return parse_marks(line, "").entries[0]

    return _check(raw, audit, MARKS, parse, lambda _: "", lambda _: None)


def _check(
    raw: bytes,
    audit: Sequence[AuditEvent],
    kinds: Collection[str],
    parse: Callable[[bytes], T],
    problem_of: Callable[[T], str],
    follow: Callable[[T], None],
) -> Checked:
    lines = raw.split(b"\n")[:-1]
    recorded = [event.evidence.encode() for event in audit if event.event in kinds]
    problems: list[str] = []
    mended: list[bytes | None] = []
    for index in range(max(len(lines), len(recorded))):
        line = lines[index] if index < len(lines) else None
        said = recorded[index] if index < len(recorded) else None
        found = None if line is None else _parsed(line, parse)
        problem = ""
        if line is None:
            problem = "is gone"
        elif found is None:
            problem = "is damaged"
        elif said is not None and line != said:
            problem = "is not what the audit log says"
        elif said is None:
            problem = problem_of(found)
        if problem:
            problems.append(f"line {index + 1} {problem}")
            line = said
            found = None if said is None else _parsed(said, parse)
        if found is not None:
            follow(found)
        mended.append(line)
    whole = tuple(line + b"\n" for line in mended if line is not None)
    return problems, whole if len(whole) == len(mended) else None


def _parsed(line: bytes, parse: Callable[[bytes], T]) -> T | None:
    try:
        return parse(line + b"\n")
    except CorruptArtifact:
        return None
