"""Histories of several processes at one adapter, and whether they could have happened one at a time.

Every operation is written down when it begins and when it is answered, by a clock that all processes of
a machine share. A killed operation has no end: it may have happened at any time since, or never.

Two registers are checked, each on its own, which is enough: where ``prod`` points, and how many versions
there are. The registry's logs say in which order writes happened. What is left to show: this order
agrees with the clock, and every read has a place in it. A read may go where its value was true, not
before anything that had ended when it began, not after anything that began when it had ended.
Reads are placed in the order in which they end, each at the first place it may have; a later place never
helps those that come after.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """When an operation began and ended; one that was killed never ended."""

    begin: float
    end: float = math.inf


@dataclass(frozen=True, slots=True)
class Read:
    """An operation that changed nothing: when, and which values of the register it allows."""

    span: Span
    allows: Callable[[Any], bool]
    said: str


def violations(first: Any, writes: Sequence[tuple[Span, Any]], reads: Sequence[Read]) -> list[str]:
    """Return why a register's history is not linearizable; nothing if it is.

    Args:
        first: the register's value in the beginning.
        writes: when, and the value from then on, in the order in which they happened.
        reads: everything that saw the register.
    """
    found = []
    latest_begin = -math.inf
    for place, (span, value) in enumerate(writes, start=1):
        if span.end < latest_begin:
            found.append(f"write {place} of {value} ended before one that it follows began")
        latest_begin = max(latest_begin, span.begin)
    values = [first, *(value for _, value in writes)]
    placed: list[tuple[Span, int]] = [(span, k) for k, (span, _) in enumerate(writes, start=1)]
    for read in sorted(reads, key=lambda read: read.span.end):
        earliest = max((k for span, k in placed if span.end < read.span.begin), default=0)
        # Up to the last write that began before the read ended.
        last = max(
            (k for k, (span, _) in enumerate(writes, start=1) if span.begin < read.span.end),
            default=0,
        )
        places = [k for k in range(earliest, last + 1) if read.allows(values[k])]
        if places:
            placed.append((read.span, places[0]))
        else:
            found.append(f"{read.said}: no place among {values[earliest : last + 1]}")
    return found


# -- one process ------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> None:
    """Do operations until there are ``job["count"]``; what the log has already is not done again."""
    from lorary.errors import AdapterNotFound, Conflict
    from lorary.registry import BaseCard, Registry

    log, who = Path(job["log"]), job["who"]
    begun = history([log]) if log.exists() else []
    done = sum(not o["id"].endswith("+") for o in begun)
    card = BaseCard.from_folder(Path(job["base"]))
    registry = Registry.open(job["registry"])
    chance = random.Random(f"{job['seed']}-{who}-{done}")
    folders = sorted(Path(job["folders"]).glob(f"{who}-*"))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def say(**fields: Any) -> None:
        os.write(file, json.dumps(fields).encode() + b"\n")

    for number in range(done, job["count"]):
        what = chance.choices(
            ["push", "move", "rollback", "read", "pull"], weights=[25, 30, 10, 25, 10]
        )[0]
        fields: dict[str, Any] = {"id": f"{who}:{number}", "what": what}
        if what == "push":
            fields["folder"] = folders[chance.randrange(len(folders))].name
        if what == "move":
            fields["to"] = chance.randint(1, registry.resolve("a").version)
            fields["expect"] = registry.aliases("a").get("prod") if chance.random() < 0.7 else "any"
        say(**fields, begin=time.monotonic())
        answer: dict[str, Any] = {}
        try:
            if what == "push":
                info = registry.push(Path(job["folders"]) / fields["folder"], "a", base=card)
                answer = {"version": info.version, "digest": info.digest}
            elif what == "move":
                expect = {} if fields["expect"] == "any" else {"expect": fields["expect"]}
                move = registry.set_alias("a", "prod", fields["to"], reason=fields["id"], **expect)
                answer = {"from": move.from_version, "to": move.to_version}
            elif what == "rollback":
                move = registry.rollback("a", "prod", reason=fields["id"])
                answer = {"from": move.from_version, "to": move.to_version}
            elif what == "read":
                answer = {"prod": registry.aliases("a").get("prod")}
                say(id=fields["id"], end=time.monotonic(), **answer)
                fields["id"] += "+"
                say(id=fields["id"], what="newest", begin=time.monotonic())
                answer = {"newest": registry.resolve("a").version}
            else:
                resolved = registry.resolve("a@1")
                out = registry.pull(
                    "a@1", Path(job["folders"]) / f"out-{who}-{number}-{os.getpid()}"
                )
                answer = {"version": resolved.version, "files": len(list(out.iterdir()))}
        except (Conflict, AdapterNotFound) as error:
            answer = {"refused": type(error).__name__}
        say(id=fields["id"], end=time.monotonic(), **answer)
    os.close(file)


# -- all of them ------------------------------------------------------------------------------


def history(logs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return every operation of all processes; ``end`` is missing where one was killed."""
    operations: dict[str, dict[str, Any]] = {}
    for log in logs:
        for line in log.read_bytes().split(b"\n")[:-1]:
            fields = json.loads(line)
            operations.setdefault(fields["id"], {}).update(fields)
    return list(operations.values())


def check_history(
    operations: Sequence[dict[str, Any]],
    moves: Sequence[tuple[str, int | None, int | None]],
    digests: dict[int, str],
    first_prod: int,
    first_newest: int,
) -> list[str]:
    """Return everything in which a history and the registry's logs do not fit together.

    Args:
        operations: the history.
        moves: reason, from and to of every line of the alias log that the processes wrote.
        digests: of every version.
        first_prod: where ``prod`` pointed in the beginning.
        first_newest: the newest version in the beginning.
    """
    by_id = {o["id"]: o for o in operations}
    found = [f"move {why!r} was made by nobody" for why, _, _ in moves if why not in by_id]
    if len({why for why, _, _ in moves}) != len(moves):
        found.append("a move was made twice")
    logged = {why: (before, after) for why, before, after in moves}
    reads: list[Read] = []
    for o in operations:
        if "end" not in o or o["what"] not in ("move", "rollback", "read"):
            continue
        if o["what"] == "read":
            reads.append(_saw(o, o["prod"]))
        elif "refused" in o:
            if o["id"] in logged:
                found.append(f"{o} was refused, and made")
            if o["what"] == "move" and o["refused"] == "Conflict":
                expect = o["expect"]
                reads.append(Read(_span(o), lambda value, e=expect: value != e, str(o)))  # type: ignore[misc]
        elif o["from"] == o["to"]:
            reads.append(_saw(o, o["to"]))
        elif logged.get(o["id"]) != (o["from"], o["to"]):
            found.append(f"{o} was acknowledged, and is not in the log")
    writes = [(_span(by_id[why]), after) for why, _, after in moves if why in by_id]
    found += violations(first_prod, writes, reads)
    return found + _check_pushes(operations, digests, first_newest)


def _check_pushes(
    operations: Sequence[dict[str, Any]], digests: dict[int, str], first: int
) -> list[str]:
    found = []
    pushes: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, int] = {}
    for o in operations:
        if o["what"] == "push":
            pushes.setdefault(o["folder"], []).append(o)
            if "version" in o:
                versions[o["folder"]] = o["version"]
                if digests.get(o["version"]) != o["digest"]:
                    found.append(f"{o} was acknowledged, and that version is another")
    if len(set(digests.values())) != len(digests):
        found.append("one content has two versions")
    by_version = {version: folder for folder, version in versions.items()}
    writes = []
    for version in range(first + 1, len(digests) + 1):
        folder = by_version.get(version)
        if folder is None:  # every push of it was killed; when it came is not known
            writes.append((Span(-math.inf), version))
            continue
        spans = [_span(o) for o in pushes[folder]]
        writes.append((Span(min(s.begin for s in spans), min(s.end for s in spans)), version))
    reads = [_saw(o, o["newest"]) for o in operations if o["what"] == "newest" and "end" in o]
    return found + violations(first, writes, reads)


def _span(o: dict[str, Any]) -> Span:
    return Span(o["begin"], o.get("end", math.inf))


def _saw(o: dict[str, Any], value: Any) -> Read:
    return Read(_span(o), lambda other: bool(other == value), str(o))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
