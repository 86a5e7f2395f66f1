"""Does an alias log add up? Its lines, one after the other, and beside the audit log."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lorary.errors import CorruptArtifact
from lorary.registry.aliases import AliasMove, MoveKind, parse_moves
from lorary.registry.audit import AuditEvent, of_move

_KINDS: dict[str, MoveKind] = {"alias": "set", "rollback": "rollback"}


def check_moves(
    raw: bytes, audit: Sequence[AuditEvent]
) -> tuple[list[str], tuple[AliasMove, ...] | None]:
    """Compare an alias log with itself and with the audit log.

    Args:
        raw: the log.
        audit: the adapter's audit log, whole; empty if there is none.

    Returns:
        What is wrong, and the moves as they were made, ``None`` where nothing tells.
    """
    lines = raw.split(b"\n")[:-1]
    recorded = [event for event in audit if event.event in _KINDS]
    problems: list[str] = []
    moves: list[AliasMove | None] = []
    state: dict[str, int | None] = {}
    for index in range(max(len(lines), len(recorded))):
        event = recorded[index] if index < len(recorded) else None
        move = _parsed(lines[index] if index < len(lines) else None)
        problem = ""
        if index >= len(lines):
            problem = "is gone"
        elif move is None:
            problem = "is damaged; it is no move of an alias"
        elif event is not None and _fields(of_move(move)) != _fields(event):
            problem = "is not what the audit log says"
        elif event is None and move.from_version != state.get(move.alias):
            problem = f"moves '{move.alias}' from where it was not"
        if problem:
            problems.append(f"line {index + 1} {problem}")
            move = _from_event(event) if event is not None else None
        if move is not None:
            state[move.alias] = move.to_version
        moves.append(move)
    whole = tuple(move for move in moves if move is not None)
    return problems, whole if len(whole) == len(moves) else None


def _parsed(line: bytes | None) -> AliasMove | None:
    if line is None:
        return None
    try:
        return parse_moves(line + b"\n", "")[0]
    except CorruptArtifact:
        return None


def _fields(event: AuditEvent) -> AuditEvent:
    return dataclasses.replace(event, versions=0, moves=0, previous="", evidence="")


def _from_event(event: AuditEvent) -> AliasMove:
    return AliasMove(
        at=event.at,
        actor=event.actor,
        alias=event.subject,
        from_version=int(event.before) if event.before else None,
        to_version=int(event.after) if event.after else None,
        reason=event.reason,
        kind=_KINDS[event.event],
    )
