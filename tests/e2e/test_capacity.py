"""The closed form of docs/scaling.md against the simulation beside it, small."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.capacity_model import (
    Fleet,
    copies_needed,
    hit_ratio,
    hottest_share,
    plan_balanced,
    plan_ring,
    popularity,
    ring_hit_ratio,
)
from benchmarks.capacity_sim import simulate

CALLS = 40_000


def fleet(**changed: float) -> Fleet:
    values = {
        "num_adapters": 300,
        "zipf": 1.0,
        "calls_per_s": 40.0,
        "answer_s": 1.0,
        "rows": 16,
        "adapters_per_replica": 40,
        "load_s": 0.05,
    }
    return Fleet(**{**values, **changed})  # type: ignore[arg-type]


def test_a_cache_of_equal_items_hits_in_proportion() -> None:
    """Che's approximation is exact here: each of N equal items is in one of C places."""
    shares = popularity(50, 0.0)
    assert hit_ratio(shares, 1.0, 20) == pytest.approx(0.4)
    # On two replicas each, twice the items for the same places.
    assert hit_ratio(shares, 2.0, 20) == pytest.approx(0.2)
    assert hit_ratio(shares, 1.0, 50) == 1.0


@pytest.mark.parametrize("zipf", [0.7, 1.0, 1.3])
def test_calls_that_load_without_affinity(zipf: float) -> None:
    asked, replicas = fleet(zipf=zipf), 6
    seen = simulate(asked, replicas, "random", calls=CALLS)
    missed = 1 - hit_ratio(asked.popularity(), float(replicas), replicas * 40)
    assert seen.miss_ratio == pytest.approx(missed, abs=0.01)


@pytest.mark.parametrize("spread", [1, 2])
def test_calls_that_load_on_a_ring(spread: int) -> None:
    # Few rows in use, so that even the hottest replica keeps up.
    asked, replicas = fleet(answer_s=0.1), 6
    seen = [
        simulate(asked, replicas, "ring", spread=spread, calls=CALLS, seed=seed).miss_ratio
        for seed in range(4)
    ]
    missed = 1 - ring_hit_ratio(asked.popularity(), spread, replicas, 40)
    assert np.mean(seen) == pytest.approx(missed, abs=0.03)


def test_the_hottest_replica_of_a_ring() -> None:
    asked, replicas = fleet(answer_s=0.1, num_adapters=2000, adapters_per_replica=2000), 8
    seen = [simulate(asked, replicas, "ring", calls=CALLS, seed=seed).hottest for seed in range(6)]
    told = hottest_share(asked.popularity(), 1, replicas) * asked.busy_rows / asked.rows
    assert np.mean(seen) == pytest.approx(told, rel=0.15)


def test_a_plan_holds_and_less_does_not() -> None:
    asked = fleet(calls_per_s=60.0)
    planned = plan_balanced(asked)
    seen = simulate(asked, planned.replicas, "multiplex", calls=CALLS)
    assert seen.miss_ratio < 0.02
    assert seen.wait_p99_s < asked.answer_s
    starved = simulate(asked, planned.replicas // 2, "multiplex", calls=CALLS)
    assert starved.wait_p99_s > asked.answer_s or starved.miss_ratio > 0.02


def test_a_ring_needs_copies_of_what_one_replica_cannot_carry() -> None:
    asked = fleet(zipf=1.5, calls_per_s=100.0)
    planned = plan_ring(asked)
    assert planned.spread >= copies_needed(asked, 0.85)[0] > 1
    seen = simulate(asked, planned.replicas, "ring", spread=planned.spread, calls=CALLS)
    assert seen.hottest < 1.0
    alone = simulate(asked, planned.replicas, "ring", spread=1, calls=CALLS)
    assert alone.hottest == pytest.approx(1.0, abs=0.01)
