"""Processes that push, move, roll back and read at once, and are killed: nothing is lost or made up."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.registry import Registry
from tests.registry.histories import Read, Span, check_history, history, violations

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

PROCESSES = int(os.environ.get("LORARY_TEST_PROCESSES", "4"))
OPERATIONS = int(os.environ.get("LORARY_TEST_OPERATIONS", "12"))
"""Of each process. `make verify-registry` runs 8 processes with 200 each."""
KILLS = int(os.environ.get("LORARY_TEST_KILLS", "4"))


def saw(begin: float, end: float, value: Any) -> Read:
    return Read(Span(begin, end), lambda other: bool(other == value), f"read of {value}")


@pytest.mark.parametrize(
    ("writes", "reads", "is_right"),
    [
        ([], [saw(0, 1, "a")], True),
        ([(Span(0, 9), "b")], [saw(1, 2, "a"), saw(3, 4, "b")], True),
        ([(Span(0, 9), "b")], [saw(1, 2, "b"), saw(3, 4, "a")], False),  # back in time
        ([(Span(0, 1), "b")], [saw(2, 3, "a")], False),  # an acknowledged write was lost
        ([(Span(5, 6), "b")], [saw(1, 2, "b")], False),  # seen before it was begun
        ([(Span(0), "b")], [saw(7, 8, "a"), saw(9, 10, "b")], True),  # killed, and done later
        ([(Span(0), "b")], [saw(7, 8, "b"), saw(9, 10, "a")], False),
        ([(Span(5, 6), "b"), (Span(1, 2), "c")], [], False),  # not in the clock's order
        ([(Span(0, 9), "b"), (Span(0, 9), "a")], [saw(1, 2, "b"), saw(3, 4, "a")], True),
        ([(Span(0, 9), "b"), (Span(0, 9), "c")], [saw(1, 4, "c"), saw(2, 3, "b")], True),
        ([(Span(0, 9), "b"), (Span(0, 9), "c")], [saw(1, 2, "c"), saw(3, 4, "b")], False),
    ],
)
def test_the_checker_itself(
    writes: list[tuple[Span, Any]], reads: list[Read], is_right: bool
) -> None:
    assert (violations("a", writes, reads) == []) is is_right


def test_the_checker_misses_no_lost_or_invented_move() -> None:
    move = {"id": "x", "what": "move", "expect": "any", "to": 2, "begin": 0.0, "end": 1.0}
    done = {**move, "from": 1, "to": 2}
    digests = {1: "d1", 2: "d2"}
    assert check_history([done], [("x", 1, 2)], digests, 1, 2) == []
    assert "not in the log" in check_history([done], [], digests, 1, 2)[0]
    assert "by nobody" in check_history([], [("x", 1, 2)], digests, 1, 2)[0]
    assert "made twice" in check_history([done], [("x", 1, 2)] * 2, digests, 1, 2)[0]
    refused = {**move, "refused": "Conflict"}
    assert "refused, and made" in check_history([refused], [("x", 1, 2)], digests, 1, 2)[0]
    pushed = {"id": "p", "what": "push", "folder": "f", "begin": 0.0, "end": 1.0, "version": 2}
    assert check_history([{**pushed, "digest": "d2"}], [], digests, 1, 1) == []
    assert "is another" in check_history([{**pushed, "digest": "d9"}], [], digests, 1, 1)[0]


def start(job: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.registry.histories", json.dumps(job)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
    )


def run_and_kill(jobs: list[dict[str, Any]], kills: int) -> int:
    """Run all jobs to their end, killing and restarting processes on the way; return how many.

    The kills are spread over the operations, not over time, so that a quick machine has as many.
    """
    chance = random.Random(0)
    workers = [start(job) for job in jobs]
    num_operations = sum(job["count"] for job in jobs)
    killed = 0
    while kills > killed and any(worker.poll() is None for worker in workers):
        time.sleep(chance.uniform(0.002, 0.05))
        if num_begun(jobs) < num_operations * killed / (kills + 1):
            continue
        number = chance.randrange(len(workers))
        # Only in the middle of its work: a process that has just begun has nothing to lose.
        if Path(jobs[number]["log"]).exists() and workers[number].poll() is None:
            workers[number].send_signal(signal.SIGKILL)
            workers[number].communicate()
            workers[number] = start(jobs[number])
            killed += 1
    for worker in workers:
        said = worker.communicate(timeout=3000)[1].decode()
        assert worker.returncode == 0, said
    return killed


def num_begun(jobs: list[dict[str, Any]]) -> int:
    """Return how many operations have begun in all."""
    logs = (Path(job["log"]) for job in jobs)
    return sum(log.read_bytes().count(b'"begin"') for log in logs if log.exists())


def test_nothing_is_lost_or_made_up(
    forge: Forge, tiny_base: Path, registry: Registry, tmp_path: Path
) -> None:
    registry.push(forge.folder("first"), "a", base=forge.card, aliases=["prod"])
    names = [f"p{number}" for number in range(PROCESSES)]
    for number, name in enumerate(names):
        for push in range(max(2, OPERATIONS // 6)):
            forge.folder(f"{name}-{push}", seed=1000 * (number + 1) + push)
    jobs: list[dict[str, Any]] = [
        {
            "who": name,
            "seed": 0,
            "count": OPERATIONS,
            "log": str(tmp_path / f"{name}.log"),
            "base": str(tiny_base),
            "registry": registry.url,
            "folders": str(forge.root),
        }
        for name in names
    ]
    killed = run_and_kill(jobs, KILLS)
    operations = history([Path(job["log"]) for job in jobs])
    after = Registry.open(registry.url)
    moves = [(m.reason, m.from_version, m.to_version) for m in after.log("a", "prod")]
    digests = {info.version: info.digest for info in after.list()}
    assert check_history(operations, moves[1:], digests, 1, 1) == []
    begun = [o for o in operations if not o["id"].endswith("+")]
    assert len(begun) == PROCESSES * OPERATIONS
    assert sum("end" not in o for o in operations) <= killed
    report = after.fsck(grace_s=0)
    assert report.is_ok, report
    cleaned = after.fsck(repair=True, grace_s=0)
    assert after.fsck(grace_s=0).findings == (), cleaned
    assert after.verify().is_ok
    events = after.audit("a")
    assert [e.after for e in events if e.event == "push"] == [digests[v] for v in sorted(digests)]
    assert [e.reason for e in events if e.event in ("alias", "rollback")] == [m[0] for m in moves]
    sys.stdout.write(
        f"linearizable: {len(begun)} operations of {PROCESSES} processes, {killed} kills, "
        f"{len(digests)} versions, {len(moves)} moves\n"
    )
