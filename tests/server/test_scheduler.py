"""The scheduler: decode first, prompts in chunks, loads delay nobody, nobody is lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import LoraryError, Overloaded
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


def make(name: str, prompt: int, *, is_ready: bool = True) -> Sequence:
    request = Request(
        request_id=name,
        prompt_ids=[1] * prompt,
        sampling=Sampling(max_tokens=4),
        lease=FakeLease(is_ready),
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
    cold, warm, late = make("cold", 2, is_ready=False), make("warm", 2), make("late", 2)
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
