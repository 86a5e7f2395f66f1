"""The queue: turns by priority, then by work done, then by deadline; places that are given back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.server.engine.fair_queue import DUE_S, FairQueue
from tests.server.on_paper import Clock, make


def take_next(queue: FairQueue) -> str:
    sequence = next(queue.heads())
    queue.take(sequence)
    return sequence.request.request_id


def test_who_is_put_back_keeps_its_turn_and_its_counter() -> None:
    queue = FairQueue(clock=Clock())
    first, second = make("a1", 1, digest="a"), make("a2", 1, digest="a")
    others = [make("b1", 1, digest="b"), make("a3", 1, digest="a"), make("c1", 1, digest="c")]
    for sequence in (first, second, *others):
        queue.add(sequence)
    assert [take_next(queue), take_next(queue), take_next(queue)] == ["a1", "a2", "b1"]
    for sequence, cost in ((first, 10), (second, 5)):
        queue.charge(sequence, cost)
    for sequence in (second, first):
        queue.put_back(sequence)
    queue.add(make("b2", 1, digest="b"))
    assert len(queue) == 5
    # c and b have been charged nothing; a keeps its 15, and its order.
    assert [take_next(queue) for _ in range(5)] == ["c1", "b2", "a1", "a2", "a3"]


def test_putting_back_does_not_lift_a_counter() -> None:
    queue = FairQueue(clock=Clock())
    quiet, busy = make("quiet", 1, digest="q"), make("busy", 1, digest="b")
    queue.add(quiet)
    queue.add(busy)
    assert [take_next(queue), take_next(queue)] == ["quiet", "busy"]
    queue.charge(busy, 100)
    queue.add(make("busy2", 1, digest="b"))
    queue.put_back(quiet)
    # A newcomer is lifted to the least that waits: quiet's 0, not busy's 100.
    queue.add(make("new", 1, digest="n"))
    assert [take_next(queue) for _ in range(3)] == ["quiet", "new", "busy2"]


def test_a_line_goes_by_the_deadline() -> None:
    clock = Clock()
    queue = FairQueue(clock=clock)
    for name, left_s in (("none", None), ("far", 600.0), ("soon", 9.0), ("sooner", 3.0)):
        queue.add(make(name, 1, deadline_s=None if left_s is None else clock.now + left_s))
    assert [take_next(queue) for _ in range(4)] == ["sooner", "soon", "none", "far"]


def test_what_has_no_deadline_is_not_overtaken_for_ever() -> None:
    clock = Clock()
    queue = FairQueue(clock=clock)
    queue.add(make("none", 1))
    clock.now += DUE_S
    queue.add(make("tight", 1, deadline_s=clock.now + 0.5))
    assert take_next(queue) == "none"


def test_among_adapters_served_alike_the_earliest_deadline_goes_first() -> None:
    clock = Clock()
    queue = FairQueue(clock=clock)
    queue.add(make("a", 1, digest="a"))
    queue.add(make("b", 1, digest="b", deadline_s=clock.now + 1))
    assert take_next(queue) == "b"


def test_counters_are_of_one_priority() -> None:
    queue = FairQueue(clock=Clock())
    batch = make("a's batch", 1, digest="a", priority=-5)
    queue.add(batch)
    take_next(queue)
    queue.charge(batch, 1000)
    served = make("b1", 1, digest="b")
    for sequence in (served, make("b2", 1, digest="b"), make("a1", 1, digest="a")):
        queue.add(sequence)
    assert take_next(queue) == "b1"
    queue.charge(served, 1)
    assert take_next(queue) == "a1", "its work at another priority does not count here"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2)), max_size=30))
def test_it_is_a_queue(items: list[tuple[str, int]]) -> None:
    """Whatever goes in comes out once, by priority, and in order within adapter and priority."""
    queue = FairQueue(clock=Clock())
    for i, (digest, priority) in enumerate(items):
        queue.add(make(str(i), 1, digest=digest, priority=priority))
    assert len(queue) == len(items)
    out = [int(take_next(queue)) for _ in items]
    assert len(queue) == 0
    assert sorted(out) == list(range(len(items)))
    assert [items[i][1] for i in out] == sorted((p for _, p in items), reverse=True)
    for item in set(items):
        alike = [i for i in out if items[i] == item]
        assert alike == sorted(alike)


def test_compositions_share_what_their_leading_adapter_is_due() -> None:
    """Many weights of one adapter are many lines and one share; else each weight would be a new one."""
    queue = FairQueue(clock=Clock())
    mixes = [make(f"mix{i}", 1, digest=f"mix:{i}") for i in range(4)]
    for mix in mixes:
        mix.request.account = "a"
    others = [make(f"b{i}", 1, digest="b") for i in range(3)]
    for sequence in (*mixes, *others):
        queue.add(sequence)
    order = []
    for _ in range(6):
        taken = next(queue.heads())
        queue.take(taken)
        queue.charge(taken, 10)
        order.append(taken.request.request_id[0])
    assert order == ["m", "b", "m", "b", "m", "b"]
    for sequence in (*mixes[:3], *others):
        queue.end(sequence)
    queue.remove(mixes[3])
    assert not vars(queue)["_accounts"]
