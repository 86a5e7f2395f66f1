"""Who is drawn, what gates say, how answers differ, and what a slow watcher is told: worked out on paper."""

from __future__ import annotations

import asyncio

import pytest

from lorary.registry.splits import Canary, Gates, Split
from lorary.server.rollout.compare import (
    Difference,
    compare_labels,
    compare_tokens,
    compare_vectors,
)
from lorary.server.rollout.events import Event, Feed
from lorary.server.rollout.gates import Copies, Tally, judge
from lorary.server.rollout.splits import Trial, share


def trial(percent: float, shadow: float = 1.0) -> Trial:
    canary = Canary(version=8, percent=percent, shadow=shadow)
    split = Split(alias="prod", version=7, canary=canary, since="", actor="", serial=1)
    made = Trial("a", split)
    made.state = "running"
    return made


def test_the_draw_is_the_documented_hash_and_a_growing_canary_keeps_its_callers() -> None:
    # printf 'canary\0a\0prod\x008\0user-1' | b2sum -l 64
    assert share("canary\0a\0prod\x008", "user-1") == 0x12CA1E551885D0E7 / 2**64 * 100
    users = [f"user-{i}" for i in range(4000)]
    drawn = {p: {u for u in users if trial(p).takes(u)} for p in (0, 1, 10, 50, 100)}
    assert [len(d) / 40 for d in drawn.values()] == pytest.approx([0, 1, 10, 50, 100], abs=2)
    assert drawn[0] == set()
    assert drawn[1] < drawn[10] < drawn[50] < drawn[100] == set(users)
    # Who gets a copy is drawn apart from who is in the canary.
    copied = {u for u in users if trial(50, 50).copies_call(u)}
    assert len(copied & drawn[50]) / 40 == pytest.approx(25, abs=2)


def tally(calls: int, errors: int = 0, seconds: float = 0.1) -> Tally:
    made = Tally()
    for _ in range(calls - errors):
        made.ok(seconds)
    for _ in range(errors):
        made.failed(ValueError("no"))
    return made


@pytest.mark.parametrize(
    ("gates", "holder", "candidate", "copies", "kind"),
    [
        ({"errors": 0.1}, tally(99), tally(9, 9), Copies(), "wait"),
        ({"errors": 0.1}, tally(99), tally(10, 2), Copies(), "fail"),
        ({"errors": 0.1}, tally(100, 15), tally(10, 2), Copies(), "pass"),
        ({"errors": 0.1}, tally(99), tally(10, 1), Copies(), "pass"),
        ({"errors": 0.1}, tally(99), tally(0), Copies(num_compared=8, num_errors=2), "fail"),
        ({"divergence": 0.2}, tally(9), tally(9), Copies(num_compared=9, divergence_sum=9), "wait"),
        (
            {"divergence": 0.2},
            tally(9),
            tally(9),
            Copies(num_compared=10, divergence_sum=3),
            "fail",
        ),
        (
            {"divergence": 0.2},
            tally(9),
            tally(9),
            Copies(num_compared=10, divergence_sum=2),
            "pass",
        ),
        ({"latency": 1.5}, tally(10), tally(10, seconds=0.16), Copies(), "fail"),
        ({"latency": 1.5}, tally(10), tally(10, seconds=0.14), Copies(), "pass"),
        ({"latency": 1.5}, tally(9), tally(10, seconds=9), Copies(), "wait"),
        ({}, tally(99), tally(99), Copies(), "wait"),
    ],
)
def test_gates(
    gates: dict[str, float], holder: Tally, candidate: Tally, copies: Copies, kind: str
) -> None:
    canary = Canary(version=8, percent=10, shadow=10, gates=Gates(calls=10, **gates))  # type: ignore[arg-type]
    assert judge(canary, holder, candidate, copies).kind == kind


def test_a_promotion_waits_for_its_calls() -> None:
    gates = Gates(calls=5, errors=0.1)
    canary = Canary(version=8, percent=10, gates=gates, promote_after=20)
    assert judge(canary, tally(50), tally(19), Copies()).kind == "wait"
    assert judge(canary, tally(50), tally(20), Copies()).kind == "pass"


@pytest.mark.parametrize(
    ("ours", "theirs", "first", "divergence"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], -1, 0.0),
        ([1, 2, 3, 4], [1, 9, 3, 4], 1, 0.75),
        ([1, 2], [1, 2, 3, 4], 2, 0.5),
        ([5], [6], 0, 1.0),
        ([], [], -1, 0.0),
    ],
)
def test_answers_differ_from_their_first_difference_on(
    ours: list[int], theirs: list[int], first: int, divergence: float
) -> None:
    found = compare_tokens(ours, theirs)
    assert (found.first, found.divergence) == (first, divergence)


def test_labels_differ_by_what_changes_hands() -> None:
    even = {"a": -1.0, "b": -1.0}
    assert compare_labels(even, even).divergence == 0
    tilted = {"a": 0.0, "b": 1.0986122886681098}  # 1/4 and 3/4
    assert compare_labels(even, tilted).divergence == pytest.approx(0.25)
    assert compare_labels({"a": 0.0}, {"b": 0.0}).divergence == 1.0
    assert compare_labels({"a": 0.0, "b": -9.0}, {"a": -9.0, "b": 0.0}).first == 0


def test_vectors_differ_by_their_angle() -> None:
    assert compare_vectors([3.0, 4.0], [30.0, 40.0]) == Difference(-1, 0.0)
    quarter = compare_vectors([1.0, 0.0], [0.0, 2.0])
    assert (quarter.first, quarter.divergence) == (0, 0.5)
    assert compare_vectors([1.0, 0.0], [-1.0, 0.0]).divergence == 1.0
    assert compare_vectors([0.0, 0.0], [0.0, 0.0]).first == -1
    assert compare_vectors([0.0, 0.0], [1.0, 0.0]).divergence == 0.5


async def test_a_slow_watcher_keeps_the_latest_and_is_told_how_many_are_gone() -> None:
    feed = Feed(limit=3)
    feed.tell(Event(kind="resident"))  # nobody listens, no loop: told to nobody
    feed.attach(asyncio.get_running_loop())
    with feed.subscribed() as slow, feed.subscribed() as quick:
        for version in range(1, 6):
            feed.tell(Event(kind="resident", version=version))
            await asyncio.sleep(0)
            events, num_lost = await quick.take()
            assert ([e.version for e in events], num_lost) == ([version], 0)
        events, num_lost = await slow.take()
        assert ([e.version for e in events], num_lost) == ([3, 4, 5], 2)
    feed.tell(Event(kind="resident"))
    await asyncio.sleep(0)
