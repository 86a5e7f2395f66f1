"""Who must go: properties of the policy, of what loads are thought to take, and of remembered failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.errors import CorruptArtifact, InvalidRequest, Unavailable
from lorary.server.adapters.eviction import MAX_USES, Eviction
from lorary.server.adapters.failures import MAX_REMEMBERED, RecentFailures
from lorary.server.adapters.load_times import LoadTimes

KEYS = "abcdef"
DENSITY = {"a": 1.0, "b": 1.0, "c": 4.0, "d": 0.25, "e": 1.0, "f": 9.0}


@given(
    st.lists(
        st.one_of(
            st.sampled_from(KEYS).map(lambda k: ("use", k)),
            st.sampled_from(KEYS).map(lambda k: ("forget", k)),
            st.frozensets(st.sampled_from(KEYS)).map(lambda held: ("evict", held)),
        ),
        max_size=60,
    )
)
def test_the_victim_is_the_least_worthy_candidate_and_the_clock_never_falls(
    actions: list[tuple[str, str]],
) -> None:
    eviction = Eviction()
    known: set[str] = set()
    for action, what in actions:
        clock = eviction.clock
        if action == "use":
            eviction.use(what)
            known.add(what)
        elif action == "forget":
            eviction.forget(what)
            known.discard(what)
        else:
            candidates = sorted(known - set(what))
            victim = eviction.victim(candidates, DENSITY.__getitem__)
            if not candidates:
                assert victim is None
                continue
            assert victim in candidates
            worth = {k: eviction.worth(k, DENSITY[k]) for k in candidates}
            assert worth[victim] == min(worth.values())
            eviction.evicted(victim, DENSITY[victim])
            known.discard(victim)
        assert eviction.clock >= clock
        assert len(eviction) == len(known)


@given(st.lists(st.sampled_from(KEYS), min_size=1))
def test_with_one_use_each_and_equal_densities_it_is_least_recently_used(uses: list[str]) -> None:
    eviction = Eviction()
    order = list(dict.fromkeys(uses))
    for key in order:
        eviction.use(key)
    for expected in order:
        victim = eviction.victim([k for k in order if eviction.uses(k)], lambda _: 1.0)
        assert victim == expected
        eviction.evicted(victim, 1.0)


@given(st.integers(1, 10_000), st.integers(2, 8))
def test_what_was_hot_once_goes_in_bounded_time(uses: int, num_places: int) -> None:
    """However often it was used: after ``MAX_USES`` rounds of newcomers it is gone."""
    eviction = Eviction()
    eviction.use("hot", uses)
    here = ["hot"] + [f"cold-{i}" for i in range(num_places - 1)]
    for key in here[1:]:
        eviction.use(key)
    for arrival in range(num_places * (MAX_USES + 2)):
        victim = eviction.victim(here, lambda _: 1.0)
        assert victim is not None
        eviction.evicted(victim, 1.0)
        here.remove(victim)
        if victim == "hot":
            return
        here.append(f"new-{arrival}")
        eviction.use(here[-1])
    pytest.fail("it is still there")


def test_the_hottest_are_told_first() -> None:
    eviction = Eviction()
    for key, uses in (("a", 1), ("b", 5), ("c", 2)):
        eviction.use(key, uses)
    assert eviction.hottest_first("abc", lambda _: 1.0) == ["b", "c", "a"]


@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 100)), max_size=30),
    st.integers(1, 10**9),
)
def test_estimates_are_never_negative(loads: list[tuple[int, float]], num_bytes: int) -> None:
    times = LoadTimes()
    for size, seconds in loads:
        times.note("registry", size, seconds)
    assert times.seconds("registry", num_bytes) >= 0


def test_overhead_and_pace_are_told_apart() -> None:
    times = LoadTimes()
    for size in (1_000_000, 8_000_000, 4_000_000, 2_000_000) * 5:
        times.note("registry", size, 0.010 + 5e-9 * size)
    assert times.seconds("registry", 16_000_000) == pytest.approx(0.090, rel=1e-3)
    assert times.seconds("host", 1_000_000) < times.seconds("registry", 1_000_000)


def test_failures_are_told_again_with_the_time_that_is_left() -> None:
    now = [100.0]
    failures = RecentFailures(30.0, clock=lambda: now[0])
    failures.note("d", InvalidRequest("bad field", field="x.y"))
    now[0] += 10
    first, second = failures.recall("d"), failures.recall("d")
    assert isinstance(first, InvalidRequest)
    assert first is not second, "raised again and again, one error would collect tracebacks"
    assert (first.field, first.retry_after_s) == ("x.y", 20.0)
    assert str(first).startswith("bad field This was found 10.0 s ago")
    now[0] += 20
    assert failures.recall("d") is None
    assert len(failures) == 0


def test_failures_are_bounded_and_can_be_switched_off() -> None:
    failures = RecentFailures(3600)
    for i in range(MAX_REMEMBERED + 50):
        failures.note(str(i), CorruptArtifact("x"))
    assert len(failures) == MAX_REMEMBERED
    assert failures.recall("0") is None
    off = RecentFailures(0)
    off.note("d", Unavailable("x"))
    assert off.recall("d") is None
    assert len(off) == 0
