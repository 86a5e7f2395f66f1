"""Which version an alias held at a time in the past."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import AdapterNotFound, InvalidRequest
from lorary.registry.local import utc_now
from lorary.registry.refs import LATEST, check_alias, check_name

if TYPE_CHECKING:
    from lorary.registry.store import Registry

_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an alias pointed at, and how long.

    Attributes:
        name: the adapter.
        alias: the alias.
        at: the time that was asked for, UTC.
        version: the version it pointed at then.
        digest: its digest; empty if its record is damaged.
        since: when it was moved there, UTC.
        until: when it was moved away; ``None`` if it is there still.
        actor: who moved it there; empty for ``latest``.
        reason: why.
        deleted: when, by whom and why the version was deleted since; empty if it was not.
    """

    name: str
    alias: str
    at: str
    version: int
    digest: str
    since: str
    until: str | None
    actor: str = ""
    reason: str = ""
    deleted: str = ""


def whowas(registry: Registry, name: str, alias: str, at: str) -> Held:
    """Return what an alias pointed at; ``latest`` is answered from when versions were pushed.

    Args:
        registry: where the adapter is.
        name: the adapter.
        alias: the alias.
        at: ``2026-11-01`` (its first moment), ``2026-11-01T12:00`` or with seconds and a zone; UTC if
            it names no zone.

    Raises:
        InvalidRef: ``name`` or ``alias`` is not valid.
        InvalidRequest: ``at`` is no time, or lies ahead.
        AdapterNotFound: no such adapter, or the alias pointed nowhere then.
    """
    check_name(name)
    check_alias(alias)
    moment = _moment(at)
    marks = registry.marks(name)
    spans = _pushes(registry, name) if alias == LATEST else _moves(registry, name, alias)
    # The log's order counts: clocks of two machines may disagree.
    then = [index for index, (since, *_) in enumerate(spans) if since <= moment]
    if not then or spans[then[-1]][1] is None:
        raise AdapterNotFound(
            f"alias '{alias}' of '{name}' pointed nowhere at {moment}"
            + (f"; its first move was at {spans[0][0]}" if spans and not then else "")
        )
    since, version, actor, reason = spans[then[-1]]
    assert version is not None
    pointer = registry.store.pointer(name, version)
    deleted = marks.deleted.get(version)
    return Held(
        name=name,
        alias=alias,
        at=moment,
        version=version,
        digest="" if pointer is None else pointer.digest,
        since=since,
        until=spans[then[-1] + 1][0] if then[-1] + 1 < len(spans) else None,
        actor=actor,
        reason=reason,
        deleted="" if deleted is None else str(deleted),
    )


def _moves(registry: Registry, name: str, alias: str) -> list[tuple[str, int | None, str, str]]:
    return [
        (move.at, move.to_version, move.actor, move.reason)
        for move in registry.log(name, alias)
        if move.to_version != move.from_version
    ]


def _pushes(registry: Registry, name: str) -> list[tuple[str, int | None, str, str]]:
    """Return when ``latest`` changed: pushes, and deletions of what was the newest."""
    changes: list[tuple[str, int, bool]] = [
        (pointer.created_at, pointer.version, True) for pointer in registry.store.pointers(name)
    ]
    changes += [(m.at, v, False) for v, m in registry.marks(name).deleted.items()]
    found: list[tuple[str, int | None, str, str]] = []
    there: set[int] = set()
    for at, version, is_push in sorted(changes, key=lambda c: (c[0], not c[2], c[1])):
        if is_push:
            there.add(version)
        else:
            there.discard(version)
        newest = max(there, default=None)
        if not found or found[-1][1] != newest:
            found.append((at, newest, "", ""))
    return found


def _moment(text: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f"{text!a} is no time; write 2026-11-01, 2026-11-01T12:00 or 2026-11-01T12:00+01:00",
            field="at",
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    at = moment.astimezone(datetime.UTC).strftime(_FORMAT)
    if at > utc_now():
        raise InvalidRequest(f"{at} lies ahead; nobody knows", field="at")
    return at
