"""The scheduler: decode first, prompts in chunks, loads delay nobody, nobody is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import Overloaded
from lorary.server.engine.fair_queue import ANSWER_COST, PROMPT_COST
from lorary.server.engine.scheduler import HOPELESS, RETRY_S, TURN, Scheduler
from tests.server.on_paper import Clock, advance, make, perform

if TYPE_CHECKING:
    from lorary.server.engine.sequence import Sequence


def test_long_prompt_is_cut_and_streams_go_on() -> None:
    scheduler = Scheduler(max_batch=4, prefill_budget=10, max_waiting=9)
    scheduler.add(make("short", 3))
    assert advance(scheduler) == ([], [("short", 3)])
    scheduler.add(make("long", 25))
    assert advance(scheduler) == (["short"], [("long", 10)])
    assert advance(scheduler) == (["short"], [("long", 10)])
    assert advance(scheduler) == (["short"], [("long", 5)])
    assert advance(scheduler) == (["short", "long"], [])


def test_prompts_take_smaller_chunks_while_answers_go_on() -> None:
    scheduler = Scheduler(max_batch=4, prefill_budget=10, prefill_beside=4, max_waiting=9)
    for name in ("a", "b", "c"):
        scheduler.add(make(name, 6))
    # Nobody waits for a token yet.
    assert advance(scheduler) == ([], [("a", 6), ("b", 4)])
    assert advance(scheduler) == (["a"], [("b", 2), ("c", 2)])
    assert advance(scheduler) == (["a", "b"], [("c", 4)])
    assert advance(scheduler) == (["a", "b", "c"], [])
    for sequence in list(scheduler.running):
        scheduler.remove(sequence)
    scheduler.add(make("d", 9))
    assert advance(scheduler) == ([], [("d", 9)])


def test_load_in_progress_delays_nobody_and_keeps_its_turn() -> None:
    scheduler = Scheduler(max_batch=1, prefill_budget=100, max_waiting=9)
    cold = make("cold", 2, is_ready=False, digest="c")
    warm, late = make("warm", 2), make("late", 2)
    for sequence in (cold, warm, late):
        scheduler.add(sequence)
    assert advance(scheduler) == ([], [("warm", 2)])
    assert scheduler.num_waiting_for_adapter == 1
    cold.request.lease.is_ready = True  # type: ignore[misc]
    scheduler.remove(warm)
    assert advance(scheduler) == ([], [("cold", 2)])


def test_full_queue_is_refused_with_its_limit() -> None:
    scheduler = Scheduler(max_batch=1, prefill_budget=8, max_waiting=2)
    scheduler.add(make("a", 1))
    scheduler.check_room(1)
    with pytest.raises(Overloaded, match="at most 2"):
        scheduler.check_room(1, num_pending=1)


def refused(scheduler: Scheduler) -> float:
    """Be refused; return after how many seconds to retry."""
    with pytest.raises(Overloaded) as caught:
        scheduler.check_room(1)
    return caught.value.retry_after_s


def test_refused_callers_are_told_when_there_will_be_room_for_each() -> None:
    scheduler = Scheduler(max_batch=1, prefill_budget=8, max_waiting=8)
    for i in range(10):
        scheduler.add(make(str(i), 1))
    first = scheduler.waiting
    for _ in range(2):
        # Two steps of 1.5 s for every place: 3 s a place.
        advance(scheduler)
        scheduler.note_step(1.5)
        advance(scheduler)
        scheduler.note_step(1.5)
        scheduler.remove(scheduler.running[0])
    assert len(first) == 8
    assert [refused(scheduler) for _ in range(3)] == pytest.approx([3.0, 6.0, 9.0], rel=0.02)
    advance(scheduler)
    scheduler.note_step(3.0)
    scheduler.add(make("the first of the three", 1))
    assert refused(scheduler) == pytest.approx(9.0, rel=0.02), "behind the other two"
    # One who asks again and again does not push the estimate beyond two queues' time.
    assert max(refused(scheduler) for _ in range(99)) == pytest.approx(8 * 3.0, rel=0.02)


def test_a_retry_is_told_a_sensible_time_before_anything_was_measured() -> None:
    scheduler = Scheduler(max_batch=1, prefill_budget=8, max_waiting=1)
    scheduler.add(make("a", 1))
    told = [refused(scheduler) for _ in range(9)]
    assert all(RETRY_S[0] <= seconds <= RETRY_S[1] for seconds in told)


@settings(deadline=None, max_examples=80)
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_batch=st.integers(1, 5),
    budget=st.integers(1, 16),
    beside=st.integers(0, 16),
)
def test_everyone_finishes_within_the_limits(
    prompts: list[int], max_batch: int, budget: int, beside: int
) -> None:
    """Invariants after every step: places and budgets are kept; every running row advances."""
    scheduler = Scheduler(
        max_batch=max_batch, prefill_budget=budget, prefill_beside=beside, max_waiting=99
    )
    everyone = [make(str(i), n) for i, n in enumerate(prompts)]
    for sequence in everyone:
        scheduler.add(sequence)
    finished: list[str] = []
    for _ in range(sum(prompts) + 10 * len(prompts) + 10):
        running_before = {s.request.request_id for s in scheduler.running if not s.is_prefilling}
        decoded, read = advance(scheduler)
        assert set(decoded) == running_before
        num_read = sum(count for _, count in read)
        assert num_read <= (min(budget, beside) if decoded and beside else budget)
        assert len(scheduler.running) <= max_batch
        assert all(count > 0 for _, count in read)
        for sequence in list(scheduler.running):
            if sequence.num_generated >= 4:
                scheduler.remove(sequence)
                finished.append(sequence.request.request_id)
        if len(finished) == len(everyone):
            break
    assert sorted(finished) == sorted(s.request.request_id for s in everyone)
    assert not scheduler.waiting


def serve(
    scheduler: Scheduler,
    steps: int,
    answer: int = 4,
    arrivals: dict[int, list[Sequence]] | None = None,
) -> list[str]:
    """Run steps on paper; return the digests of finished answers, in order."""
    finished = []
    for step in range(steps):
        for sequence in (arrivals or {}).get(step, []):
            scheduler.add(sequence)
        advance(scheduler)
        for sequence in list(scheduler.running):
            if sequence.num_generated >= answer:
                scheduler.remove(sequence)
                finished.append(sequence.request.lease.digest)
    return finished


def test_a_flood_for_one_adapter_does_not_drown_another() -> None:
    scheduler = Scheduler(max_batch=2, prefill_budget=64, max_waiting=999)
    for i in range(100):
        scheduler.add(make(f"a{i}", 8, digest="a"))
    advance(scheduler)
    scheduler.add(make("b", 8, digest="b"))
    finished = serve(scheduler, 12)
    assert "b" in finished, "b's turn comes with the next free place, before 97 of a"
    assert finished.index("b") <= 3


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=2, max_size=5),
    max_batch=st.integers(1, 6),
)
def test_adapters_that_all_wait_get_equal_work(
    sizes: list[tuple[int, int]], max_batch: int
) -> None:
    """While everybody waits, work differs by no more than the paper's bound (Theorem 4.4)."""
    scheduler = Scheduler(max_batch=max_batch, prefill_budget=10_000, max_waiting=10_000)
    lengths = dict(zip("abcde", sizes, strict=False))
    for digest, (prompt, _) in lengths.items():
        for i in range(200):
            scheduler.add(make(f"{digest}{i}", prompt, digest=digest))
    work = dict.fromkeys(lengths, 0)
    for _ in range(120):
        if {s.request.lease.digest for s in scheduler.waiting} != set(lengths):
            break
        scheduled = scheduler.next_batch(lambda s: True)
        perform(scheduled)
        for sequence in scheduled.decode:
            work[sequence.request.lease.digest] += ANSWER_COST
        for sequence, count in scheduled.prefill:
            work[sequence.request.lease.digest] += PROMPT_COST * count
        for sequence in list(scheduler.running):
            if sequence.num_generated >= lengths[sequence.request.lease.digest][1]:
                scheduler.remove(sequence)
    # Nobody is ahead by more than what a full batch of the largest requests costs, twice.
    largest = max(PROMPT_COST * prompt + ANSWER_COST * answer for prompt, answer in sizes)
    assert max(work.values()) - min(work.values()) <= 2 * max_batch * largest


def test_idling_earns_no_credit() -> None:
    scheduler = Scheduler(max_batch=1, prefill_budget=64, max_waiting=999)
    for i in range(30):
        scheduler.add(make(f"a{i}", 8, digest="a"))
    serve(scheduler, 40)
    arrivals = {0: [make(f"b{i}", 8, digest="b") for i in range(30)]}
    finished = serve(scheduler, 40, arrivals=arrivals)
    assert 0.35 <= finished.count("b") / len(finished) <= 0.65, "b shares, it does not catch up"


def test_queue_forgets_adapters_that_have_left() -> None:
    scheduler = Scheduler(max_batch=4, prefill_budget=64, max_waiting=9999)
    for i in range(500):
        scheduler.add(make(str(i), 1, digest=str(i)))
    serve(scheduler, 1000)
    assert len(scheduler.waiting) == 0
    assert not list(scheduler.waiting)
    assert not vars(scheduler.waiting)["_accounts"]


def scheduler_with(clock: Clock, **options: int) -> Scheduler:
    sizes = {"max_batch": 1, "prefill_budget": 64, "max_waiting": 9999, **options}
    return Scheduler(**sizes, patience_s=5.0, clock=clock)


def place_after_place(scheduler: Scheduler, count: int) -> list[str]:
    """Give so many places, each to whoever is next, and end all at once; return their names."""
    names = []
    for _ in range(count):
        scheduler.next_batch(lambda s: True)
        for sequence in list(scheduler.running):
            names.append(sequence.request.request_id[0])
            scheduler.remove(sequence)
    return names


def test_the_highest_priority_is_served_first() -> None:
    scheduler = scheduler_with(Clock())
    for name, priority in (("low", -10), ("normal", 0), ("high", 3), ("urgent", 10)):
        scheduler.add(make(name, 1, priority=priority))
    assert place_after_place(scheduler, 4) == ["u", "h", "n", "l"]


def test_who_is_passed_over_gets_every_fourth_place_and_no_more() -> None:
    clock = Clock()
    scheduler = scheduler_with(clock)
    for i in range(99):
        scheduler.add(make(f"high{i}", 1, priority=1))
        scheduler.add(make(f"low{i}", 1, digest="a"))
        scheduler.add(make(f"xlow{i}", 1, digest="b", priority=-3))
    clock.now += 1
    assert place_after_place(scheduler, 3) == ["h", "h", "h"], "nobody is owed anything yet"
    clock.now += 4
    assert place_after_place(scheduler, 12) == [*"lhhh", *"xhhh", *"hhhh"]
    clock.now += 4.9
    assert "l" not in place_after_place(scheduler, 8), "it had a place less than 5 s ago"
    clock.now += 0.2
    assert place_after_place(scheduler, 2 * TURN).count("l") == 1


def test_who_waits_for_its_adapter_is_not_passed_over() -> None:
    clock = Clock()
    scheduler = scheduler_with(clock)
    cold = make("cold", 1, is_ready=False, digest="c", priority=-1)
    scheduler.add(cold)
    for i in range(20):
        scheduler.add(make(f"high{i}", 1))
    clock.now += 60
    place_after_place(scheduler, 4)
    cold.request.lease.is_ready = True  # type: ignore[misc]
    assert "c" not in place_after_place(scheduler, 4), "the load was no waiting for a place"
    clock.now += 5
    assert "c" in place_after_place(scheduler, 1)


def test_what_is_owed_and_finds_no_room_is_not_overtaken() -> None:
    clock = Clock()
    scheduler = scheduler_with(clock, max_batch=2)
    scheduler.add(make("running", 1))
    advance(scheduler)
    scheduler.add(make("big", 50))
    scheduler.add(make("small", 1, digest="a"))
    clock.now += 5
    has_room = {"small"}
    advance(scheduler, lambda s: s.request.request_id in has_room)
    assert len(scheduler.running) == 1, "small ones would keep the big one out for ever"
    has_room.add("big")
    advance(scheduler, lambda s: s.request.request_id in has_room)
    assert [s.request.request_id for s in scheduler.running] == ["running", "big"]


def test_what_is_owed_and_refused_does_not_stop_an_idle_server() -> None:
    clock = Clock()
    scheduler = scheduler_with(clock)
    scheduler.add(make("big", 50))
    scheduler.add(make("small", 1, digest="a"))
    clock.now += 5
    assert advance(scheduler, lambda s: s.request.request_id == "small")[1] == [("small", 1)]


def test_the_cap_counts_adapters_and_not_the_base() -> None:
    scheduler = scheduler_with(Clock(), max_batch=9, max_adapters=2)
    for digest in ("a", "b", "c", "", "a", "d", ""):
        scheduler.add(make(digest or "base", 1, digest=digest))
    advance(scheduler)
    assert sorted(s.request.lease.digest for s in scheduler.running) == ["", "", "a", "a", "b"]
    scheduler.remove(next(s for s in scheduler.running if s.request.lease.digest == "b"))
    advance(scheduler)
    assert {s.request.lease.digest for s in scheduler.running} == {"", "a", "c"}


def test_an_adapter_that_the_cap_keeps_out_gets_its_turn_by_draining_another() -> None:
    clock = Clock()
    scheduler = scheduler_with(clock, max_batch=4, max_adapters=2)
    for i in range(200):
        scheduler.add(make(f"a{i}", 1, digest="a", answer=30))
        scheduler.add(make(f"b{i}", 1, digest="b", answer=10))
    advance(scheduler)
    scheduler.add(make("c", 1, digest="c"))
    waited = 0
    while "c" not in {s.request.lease.digest for s in scheduler.running}:
        advance(scheduler)
        assert len(scheduler.running) == 4, "places that end go on to the adapter that stays"
        clock.now += 0.5
        waited += 1
        assert len({s.request.lease.digest for s in scheduler.running}) <= 2
        for sequence in list(scheduler.running):
            if sequence.num_generated >= sequence.request.sampling.max_tokens:
                scheduler.remove(sequence)
        assert waited <= 10 + 10 + 1, "patience, and what the nearest to done still had to do"
    assert {s.request.lease.digest for s in scheduler.running} == {"a", "c"}


def test_the_victim_is_the_lowest_priority_then_the_latest_arrival() -> None:
    scheduler = scheduler_with(Clock(), max_batch=9)
    for name, priority, arrived_ns in (("a", 0, 5), ("b", -1, 3), ("c", -1, 4), ("d", 9, 9)):
        scheduler.add(make(name, 1, priority=priority, arrived_ns=arrived_ns))
    advance(scheduler)
    order = []
    while scheduler.running:
        victim = scheduler.victim()
        order.append(victim.request.request_id)
        scheduler.remove(victim)
    assert order == ["c", "b", "a", "d"]


def test_who_is_put_back_is_the_next_of_its_adapter() -> None:
    scheduler = scheduler_with(Clock(), max_batch=2)
    for name in ("first", "second", "third"):
        scheduler.add(make(name, 1))
    advance(scheduler)
    for _ in range(2):
        scheduler.preempt(scheduler.victim())
    assert not scheduler.running
    assert [s.request.request_id for s in scheduler.waiting] == ["first", "second", "third"]


def test_deadlines_that_passed_are_late_wherever_they_are() -> None:
    clock = Clock()
    scheduler = scheduler_with(clock)
    running = make("running", 1, deadline_s=clock.now + 2)
    waiting = make("waiting", 1, deadline_s=clock.now + 3)
    for sequence in (running, waiting, make("patient", 1)):
        scheduler.add(sequence)
    advance(scheduler)
    assert scheduler.late() == {}
    clock.now += 2
    assert list(scheduler.late()) == [running]
    assert "after 1 tokens" in str(scheduler.late()[running])
    clock.now += 1
    assert list(scheduler.late()) == [running, waiting]
    assert "in the queue, before any work" in str(scheduler.late()[waiting])


def test_only_what_is_hopeless_by_far_is_shed() -> None:
    clock = Clock()
    scheduler = scheduler_with(clock)
    hopeless = make("hopeless", 1, deadline_s=clock.now + 0.99 / HOPELESS)
    tight = make("tight", 1, deadline_s=clock.now + 1.01 / HOPELESS)
    returned = make("returned", 1, deadline_s=clock.now + 0.5 / HOPELESS)
    returned.token_ids.append(1)
    for sequence in (hopeless, tight, returned):
        scheduler.add(sequence)
    assert scheduler.late() == {}, "nothing was measured"
    for _ in range(9):
        scheduler.note_step(1.0)
    assert scheduler.late() == {}, "nobody runs: who knows how fast the next step is"
    scheduler.add(make("running", 1, priority=5))
    advance(scheduler)
    assert list(scheduler.late()) == [hopeless]
    assert "before any work" in str(scheduler.late()[hopeless])
