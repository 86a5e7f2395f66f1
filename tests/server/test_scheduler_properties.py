"""What holds for any traffic, on a simulated clock: nothing is lost, nobody starves, work is shared."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.server.engine.fair_queue import ANSWER_COST, PROMPT_COST
from lorary.server.engine.scheduler import TURN
from tests.server.simulator import Call, Line, Simulator, line_of

MEMORY = 60
PROMPTS, ANSWERS = st.integers(1, 40), st.integers(1, 12)
SECONDS = st.floats(0.0, 20.0)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    return Call(
        at_step=draw(st.integers(0, 60)),
        digest=draw(st.sampled_from(["", "a", "b", "c", "d"])),
        priority=draw(st.sampled_from([0, 0, 0, -10, 1, 10])),
        prompt=draw(PROMPTS),
        answer=draw(ANSWERS),
        load_s=draw(st.sampled_from([0.0, 0.0, 0.0, 1.5, -1.5])),
        deadline_s=draw(st.none() | st.none() | SECONDS),
        cancel_s=draw(st.none() | st.none() | st.none() | SECONDS),
    )


@settings(deadline=None, max_examples=150)
@given(
    calls=st.lists(calls(), max_size=40),
    max_batch=st.integers(1, 5),
    budget=st.integers(1, 32),
    max_adapters=st.integers(0, 3),
    patience_s=st.sampled_from([0.0, 0.5, 5.0]),
    memory=st.sampled_from([MEMORY, 2 * MEMORY, math.inf]),
)
def test_everybody_ends_once_and_every_limit_is_kept(
    calls: list[Call],
    max_batch: int,
    budget: int,
    max_adapters: int,
    patience_s: float,
    memory: float,
) -> None:
    """The simulator checks every step; here is how everybody ended, and for a reason of its own."""
    simulator = Simulator(calls, max_batch, budget, max_adapters, patience_s, memory)
    check_ends(simulator)


@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(
        st.builds(
            Call,
            at_step=st.integers(0, 8),
            digest=st.sampled_from(["", "a"]),
            priority=st.sampled_from([0, 0, 5]),
            prompt=st.integers(1, 15),
            answer=st.integers(5, 20),
            deadline_s=st.none() | st.floats(5.0, 40.0),
        ),
        min_size=12,
        max_size=30,
    ),
    patience_s=st.sampled_from([0.5, 5.0]),
)
def test_a_crowd_that_loses_its_places_again_and_again(
    calls: list[Call], patience_s: float
) -> None:
    """The same, where memory runs out all the time and deadlines change who is next."""
    check_ends(Simulator(calls, 6, 32, patience_s=patience_s, memory=MEMORY))


def check_ends(simulator: Simulator) -> None:
    """Run it; everybody has ended as the call said that it might."""
    calls = simulator.calls
    simulator.run()
    for name, how in simulator.ends.items():
        call = calls[int(name)]
        if how == "late":
            assert call.deadline_s is not None
        elif how == "cancelled":
            assert call.cancel_s is not None
        elif how == "failed":
            assert any(c.load_s < 0 for c in calls if c.digest == call.digest)
    served = Counter(s.request.request_id for s in simulator.places)
    assert sum(served.values()) - len(served) <= simulator.num_put_back
    assert all(served[name] for name, how in simulator.ends.items() if how == "finished")


@settings(deadline=None, max_examples=60)
@given(
    traffic=st.lists(
        st.builds(
            Call,
            at_step=st.integers(0, 80),
            digest=st.sampled_from(["", "a", "b", "c", "d", "e"]),
            priority=st.sampled_from([0, 0, 5, 10]),
            prompt=PROMPTS,
            answer=ANSWERS,
        ),
        min_size=40,
        max_size=120,
    ),
    low=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    max_batch=st.integers(1, 4),
    patience_s=st.sampled_from([0.5, 2.0]),
)
def test_who_is_passed_over_has_one_of_the_next_places(
    traffic: list[Call], low: list[int], max_batch: int, patience_s: float
) -> None:
    """The bound of ``scheduler``: of G lines that old, each has one of the next TURN x G places."""
    modest = [Call(at_step=at, digest="low", priority=-10) for at in low]
    simulator = Simulator([*traffic, *modest], max_batch, 64, patience_s=patience_s)
    since: dict[Line, float] = {}
    places_left: dict[Line, int] = {}
    while not simulator.is_over:
        simulator.prepare()
        now = simulator.clock.now
        for sequence in simulator.scheduler.waiting:
            since.setdefault(line_of(sequence), now)
        old = {line for line, began in since.items() if now - began >= patience_s}
        for line in old - set(places_left):
            places_left[line] = TURN * len(old)
        before = len(simulator.places)
        simulator.work_on()
        for sequence in simulator.places[before:]:
            taken = line_of(sequence)
            since[taken] = now
            places_left.pop(taken, None)
            for line in places_left:
                places_left[line] -= 1
                assert places_left[line] > 0, f"{line} starves"
        waiting = {line_of(sequence) for sequence in simulator.scheduler.waiting}
        since = {line: began for line, began in since.items() if line in waiting}


@settings(deadline=None, max_examples=15)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(4, 12)), min_size=4, max_size=6),
    priorities=st.lists(st.sampled_from([0, 0, 7]), min_size=6, max_size=6),
    cap=st.integers(1, 3),
)
def test_who_the_cap_keeps_out_has_its_turn_in_bounded_time(
    sizes: list[tuple[int, int]], priorities: list[int], cap: int
) -> None:
    """More adapters than the cap allows, none of which ever runs out of work: all are served."""
    calls = [
        Call(0, digest, priority, prompt, answer)
        for digest, (prompt, answer), priority in zip("abcdef", sizes, priorities, strict=False)
        for _ in range(50)
    ]
    simulator = Simulator(calls, 4, 32, cap, patience_s=1.0)
    # Whoever has a place has left it after so many steps: four prompts, then an answer.
    longest_prompt, longest_answer = max(p for p, _ in sizes), max(a for _, a in sizes)
    span_s = (math.ceil(4 * longest_prompt / 32) + longest_answer + 1) * simulator.step_s * 1.4
    # For each that is as old: TURN places, of which a batch gives 4 in a span, and one adapter drained.
    bound_s = 1.0 + 3 * len(sizes) * span_s
    last: dict[Line, float] = dict.fromkeys(
        {(call.priority, call.digest) for call in calls}, simulator.clock.now
    )
    while not simulator.is_over:
        now, before = simulator.clock.now, len(simulator.places)
        simulator.step()
        for sequence in simulator.places[before:]:
            last[line_of(sequence)] = now
        for line in {line_of(sequence) for sequence in simulator.scheduler.waiting}:
            assert now - last[line] <= bound_s, f"{line} starves"


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(PROMPTS, ANSWERS, PROMPTS, ANSWERS),
    others=st.lists(
        st.builds(
            Call,
            at_step=st.integers(0, 150),
            digest=st.sampled_from(["", "c", "d"]),
            priority=st.sampled_from([-1, 0, 0, 1]),
            prompt=PROMPTS,
            answer=ANSWERS,
        ),
        max_size=40,
    ),
    max_batch=st.integers(1, 5),
    budget=st.integers(8, 64),
)
def test_two_adapters_that_both_wait_get_equal_work(
    sizes: tuple[int, int, int, int], others: list[Call], max_batch: int, budget: int
) -> None:
    """The VTC bound (arXiv:2401.00588, Theorem 4.4), with places instead of memory.

    While both wait, in whatever company, the work that one gets in any stretch of time exceeds the
    other's by at most 2U, where U is a full batch of the largest request. Nobody is passed over here.
    """
    a, b = Call(0, "a", 0, *sizes[:2]), Call(0, "b", 0, *sizes[2:])
    simulator = Simulator([*[a] * 60, *[b] * 60, *others], max_batch, budget, patience_s=math.inf)
    ahead = [0]
    while True:
        simulator.step()
        if not {(0, "a"), (0, "b")} <= {line_of(s) for s in simulator.scheduler.waiting}:
            break
        ahead.append(simulator.work[0, "a"] - simulator.work[0, "b"])
    largest = max(PROMPT_COST * call.prompt + ANSWER_COST * call.answer for call in (a, b))
    assert max(ahead) - min(ahead) <= 2 * max_batch * largest
