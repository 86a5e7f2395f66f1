"""The audit log of an adapter on a Hub, derived: there every change is a commit, and says who made it.

=====================  ==========================================
``v3: …``              a push; when is told by the version's line
``alias prod to v3``   a move; all else is told by the alias log
``delete v3``          a mark; all else is told by the log of marks
``reserve v3``         a deleted version's number, taken by a mirror: its mark
``sign v3: ada``       a signature
=====================  ==========================================

The chain is the Hub's own: ``evidence`` is the commit's id.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Final

from lorary.registry.aliases import AliasMove
from lorary.registry.audit import MARKS, AuditEvent, of_mark, of_move
from lorary.registry.marks import Mark
from lorary.registry.versions import Pointer

_PUSH: Final = re.compile(r"v([1-9][0-9]*): ")
_MARK: Final = re.compile(rf"(?:{'|'.join(sorted(MARKS))}) (?:v[1-9][0-9]*|alias \S+)")
_RESERVE: Final = re.compile(r"reserve v[1-9][0-9]*")
_SIGN: Final = re.compile(r"sign v([1-9][0-9]*): (.*)")
_MOVE: Final = re.compile(r"alias \S+ (?:removed|to v[1-9][0-9]*|without canary|with .+)")


def hub_audit(
    pointers: Iterable[Pointer],
    moves: Sequence[AliasMove],
    marks: Sequence[Mark],
    history: Sequence[tuple[str, str, str, str]],
) -> tuple[AuditEvent, ...]:
    """Return every change of an adapter, oldest first.

    Args:
        pointers: the versions.
        moves: all moves of aliases, oldest first.
        marks: all marks, oldest first.
        history: commit, title, author and time, newest first.
    """
    by_version = {pointer.version: pointer for pointer in pointers}
    left, marks_left = list(moves), list(marks)
    events: list[AuditEvent] = []
    versions = 0
    for commit, title, author, at in reversed(history):
        pushed, signed = _PUSH.match(title), _SIGN.fullmatch(title)
        pointer = by_version.pop(int(pushed[1]), None) if pushed else None
        if pointer is not None:
            versions = pointer.version
            event = AuditEvent(
                at=pointer.created_at,
                actor=author,
                event="push",
                subject=str(pointer.version),
                after=pointer.digest,
            )
        elif _MOVE.fullmatch(title) and left:
            event = of_move(left.pop(0))
        elif (_MARK.fullmatch(title) or _RESERVE.fullmatch(title)) and marks_left:
            event = of_mark(marks_left.pop(0))
        elif signed is not None:
            event = AuditEvent(
                at=at, actor=signed[2] or author, event="sign", subject=signed[1], after="signed"
            )
        else:
            continue
        events.append(
            dataclasses.replace(
                event,
                evidence=commit,
                versions=versions,
                moves=len(moves) - len(left),
                marks=len(marks) - len(marks_left),
            )
        )
    return tuple(events)
