"""The scheduler: decode first, prompts in chunks, loads delay nobody, nobody is lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import LoraryError, Overloaded
from lorary.server.engine.fair_queue import ANSWER_COST, PROMPT_COST
from lorary.server.engine.request import Request, Sampling
from lorary.server.engine.scheduler import Scheduler
from lorary.server.engine.sequence import Sequence


@dataclass
class FakeLease:
    """A lease that is ready when told so."""

    is_ready: bool = True
    digest: str = ""
    error: LoraryError | None = None

    def release(self) -> None:
        """Nothing is held."""


def make(name: str, prompt: int, *, is_ready: bool = True, digest: str = "") -> Sequence:
    request = Request(
        request_id=name,
        prompt_ids=[1] * prompt,
        sampling=Sampling(max_tokens=4),
        lease=FakeLease(is_ready, digest),
    )
    return Sequence(request=request, token_ids=[1] * prompt)


def advance(scheduler: Scheduler) -> tuple[list[str], list[tuple[str, int]]]:
    """Run one step on paper; return who decoded and who read how many prompt tokens."""
    scheduled = scheduler.next_batch(lambda s: True)
    for sequence in scheduled.decode:
        sequence.num_computed += 1
        sequence.token_ids.append(1)
    for sequence, count in scheduled.prefill:
        sequence.num_computed += count
        if not sequence.is_prefilling:
            sequence.token_ids.append(1)
    return (
        [s.request.request_id for s in scheduled.decode],
        [(s.request.request_id, count) for s, count in scheduled.prefill],
    )


def test_long_prompt_is_cut_and_streams_go_on() -> None:
    scheduler = Scheduler(max_batch=4, prefill_budget=10, max_waiting=9)
    scheduler.add(make("short", 3))
    assert advance(scheduler) == ([], [("short", 3)])
    scheduler.add(make("long", 25))
    assert advance(scheduler) == (["short"], [("long", 10)])
    assert advance(scheduler) == (["short"], [("long", 10)])
    assert advance(scheduler) == (["short"], [("long", 5)])
    assert advance(scheduler) == (["short", "long"], [])


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
    with pytest.raises(Overloaded, match="at most 2") as caught:
        scheduler.check_room(1, num_pending=1)
    assert caught.value.retry_after_s > 0


@settings(deadline=None, max_examples=80)
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_batch=st.integers(1, 5),
    budget=st.integers(1, 16),
)
def test_everyone_finishes_within_the_limits(
    prompts: list[int], max_batch: int, budget: int
) -> None:
    """Invariants after every step: places and budget are kept; every running row advances."""
    scheduler = Scheduler(max_batch=max_batch, prefill_budget=budget, max_waiting=99)
    everyone = [make(str(i), n) for i, n in enumerate(prompts)]
    for sequence in everyone:
        scheduler.add(sequence)
    finished: list[str] = []
    for _ in range(sum(prompts) + 10 * len(prompts) + 10):
        running_before = {s.request.request_id for s in scheduler.running if not s.is_prefilling}
        decoded, read = advance(scheduler)
        assert set(decoded) == running_before
        assert sum(count for _, count in read) <= budget
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
        for sequence in scheduled.decode:
            sequence.num_computed += 1
            sequence.token_ids.append(1)
            work[sequence.request.lease.digest] += ANSWER_COST
        for sequence, count in scheduled.prefill:
            sequence.num_computed += count
            sequence.token_ids.append(1)
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
    assert not vars(scheduler.waiting)["_counters"]
