"""How many replicas adapters and traffic need, in closed form.

Words: ``A`` adapters whose calls come as a Zipf law, rate of adapter i ``lambda p_i`` with ``p_i ~ i^-s``; each
answer keeps one of a replica's ``B`` rows for ``S`` seconds; a replica's memory holds ``k`` adapters, and a load
takes ``L`` seconds on one of two threads.

1. *Rows.* Calls keep ``a = lambda S`` rows busy; with a share ``rho`` of them in use, ``R >= a / (rho B)``.
2. *Copies.* No router may ask a replica for more rows than it has, so adapter i needs
   ``d_i >= p_i a / (rho B)`` replicas. A ring of hashes has one spread ``d`` for all.
3. *Memory.* A cache of ``C`` places under independent calls, least recently used out first, behaves as if each
   item stayed for the same time ``T`` after its last use (Che, Tung and Wang 2002, "Hierarchical Web Caching
   Systems", section III). R replicas in which adapter i has ``d_i`` homes are one cache of ``C = R k`` with
   ``d_i`` items of rate ``lambda p_i / d_i`` each::

       sum over i of  d_i (1 - exp(-lambda p_i T / d_i)) = R k
       hits = sum over i of  p_i (1 - exp(-lambda p_i T / d_i))

   ``d_i = R`` is no affinity at all. On a ring of hashes d places belong to
   ``d_i = R (1 - (1 - 1/R)^d)`` replicas on average, and some have more adapters than others: shares q of them, of mean 1/R and variance ``1 / (A d R) + 1 / (R^2 V)``, V points on the ring for each.
   A replica with a share q hits as a fleet with ``C = k / q`` does; the mean over q is taken at five points.
4. *The hottest replica of a ring.* Its share of all calls is about the larger of ``p_1/d + (1 - p_1)/R`` and
   ``1/R + sigma sqrt(2 ln R)``, where ``sigma^2 = sum(p_i^2) / (d R) + 1 / (R^2 V)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RING_SIZE = 65_536
"""Points on the ring of ``lorary.client``, all replicas together."""
NUM_LOADERS = 2
"""Threads of a server that load adapters."""
MAX_REPLICAS = 100_000
MAX_SPREAD = 64
"""Of ``lorary.client``'s ``affinity``."""
_FACTORS = (1, 1.5, 2, 3, 4, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is asked of whom.

    Attributes:
        num_adapters: A.
        zipf: s; 0 asks all alike, 1 is what shared services see, more has a sharper head.
        calls_per_s: lambda, of the fleet.
        answer_s: S, mean seconds for which an answer keeps a row.
        rows: B, of a replica (``--max-batch``, or what it holds its speed with).
        adapters_per_replica: k, ``--adapter-memory`` over the bytes of an adapter (``lorary ps``).
        load_s: L, seconds from the registry to the device.
    """

    num_adapters: int
    zipf: float
    calls_per_s: float
    answer_s: float
    rows: int
    adapters_per_replica: int
    load_s: float

    @property
    def busy_rows(self) -> float:
        """Rows that the calls keep busy, on average."""
        return self.calls_per_s * self.answer_s

    def popularity(self) -> Floats:
        """Return p_1 … p_A, in falling order; they add up to 1."""
        return popularity(self.num_adapters, self.zipf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many replicas, and what they would see.

    Attributes:
        replicas: R.
        spread: d of a ring; for a router that looks at load, the copies of the hottest adapter.
        because: ``rows``, ``memory``, ``loads`` or ``hot replica``: which of them asked for so many.
        hit_ratio: calls whose adapter is there.
        hottest: rows in use on the busiest replica, of those it has.
    """

    replicas: int
    spread: int
    because: str
    hit_ratio: float
    hottest: float


def popularity(num_adapters: int, zipf: float) -> Floats:
    """Return the shares of a Zipf law, in falling order; they add up to 1."""
    weights: Floats = np.arange(1, num_adapters + 1, dtype=np.float64) ** -zipf
    shares: Floats = weights / weights.sum()
    return shares


def hit_ratio(shares: Floats, copies: Floats | float, places: float) -> float:
    """Return the share of calls whose adapter is there (3).

    Args:
        shares: p_i, of each adapter.
        copies: d_i, replicas that each is called on.
        places: R k.
    """
    homes = np.broadcast_to(np.asarray(copies, dtype=np.float64), shares.shape)
    if places >= homes.sum():
        return 1.0
    rates = shares / homes

    def occupied(time: float) -> float:
        return float((homes * -np.expm1(-rates * time)).sum())

    low, high = 0.0, 1.0
    while occupied(high) < places:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if occupied(middle) < places else (low, middle)
    return float((shares * -np.expm1(-rates * high)).sum())


def ring_hit_ratio(
    shares: Floats, spread: int, replicas: int, places: int, *, ring: int = RING_SIZE
) -> float:
    """Return the same of a ring of hashes, whose replicas have more and fewer adapters (3).

    Args:
        shares: p_i, of each adapter.
        spread: d.
        replicas: R.
        places: k, of one replica.
        ring: points on the ring, all together.
    """
    if replicas == 1:
        return hit_ratio(shares, 1.0, places)
    variance = replicas / (len(shares) * spread) + replicas / ring
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    # Of 1/R; a share is never negative, and as a mean they are what they should be.
    sizes = np.maximum(1 + nodes * math.sqrt(variance), 0.05)
    weights = weights * sizes
    homes = replicas * (1 - (1 - 1 / replicas) ** spread)
    found = [hit_ratio(shares, homes, places * replicas / size) for size in sizes]
    return float(np.average(found, weights=weights))


def hottest_share(shares: Floats, spread: int, replicas: int, *, ring: int = RING_SIZE) -> float:
    """Return the share of all calls that a ring sends to its busiest replica (4)."""
    if replicas == 1:
        return 1.0
    per_replica = max(1.0, ring / replicas)
    variance = float((shares**2).sum()) / (spread * replicas) + 1 / (replicas**2 * per_replica)
    by_chance = 1 / replicas + math.sqrt(2 * math.log(replicas) * variance)
    by_one = float(shares[0]) / spread + (1 - float(shares[0])) / replicas
    return min(1.0, max(by_chance, by_one))


def copies_needed(fleet: Fleet, utilisation: float) -> Floats:
    """Return d_i (2): replicas that each adapter's calls need for their rows."""
    wanted = fleet.popularity() * fleet.busy_rows / (utilisation * fleet.rows)
    return np.maximum(1.0, np.ceil(wanted))


def plan_balanced(fleet: Fleet, *, utilisation: float = 0.7, hits: float = 0.99) -> Plan:
    """Return what a router needs that knows who has what and who is busy: Ray Serve, or bounded loads.

    Args:
        fleet: what is asked of whom.
        utilisation: rho, share of all rows to be in use.
        hits: share of calls whose adapter must be there.
    """
    shares, homes = fleet.popularity(), copies_needed(fleet, utilisation)
    by_rows = max(1, math.ceil(fleet.busy_rows / (utilisation * fleet.rows)))
    replicas, because = by_rows, "rows"
    while True:
        found = hit_ratio(
            shares, np.minimum(homes, replicas), replicas * fleet.adapters_per_replica
        )
        lacking = _lacking(fleet, replicas, found, hits)
        if lacking is None or replicas >= MAX_REPLICAS:
            break
        because = lacking
        replicas = _next(replicas)
    return Plan(
        replicas=replicas,
        spread=int(min(homes[0], replicas)),
        because=because,
        hit_ratio=found,
        hottest=fleet.busy_rows / (replicas * fleet.rows),
    )


def plan_ring(fleet: Fleet, *, utilisation: float = 0.85, hits: float = 0.99) -> Plan:
    """Return what a ring of hashes needs, whose clients know nothing of load.

    Args:
        fleet: what is asked of whom.
        utilisation: rho, share of the *busiest* replica's rows to be in use.
        hits: share of calls whose adapter must be there.
    """
    least = int(copies_needed(fleet, utilisation)[0])
    # More places than the hottest adapter needs cost memory, and level what is beside it on its replicas.
    spreads = sorted({min(MAX_SPREAD, math.ceil(least * factor)) for factor in _FACTORS})
    plans = [_plan_spread(fleet, spread, utilisation, hits) for spread in spreads]
    return min(plans, key=lambda plan: plan.replicas)


def _plan_spread(fleet: Fleet, spread: int, utilisation: float, hits: float) -> Plan:
    shares = fleet.popularity()
    replicas = max(spread, math.ceil(fleet.busy_rows / (utilisation * fleet.rows)))
    because = "rows"
    while True:
        busiest = hottest_share(shares, spread, replicas) * fleet.busy_rows / fleet.rows
        found = ring_hit_ratio(shares, spread, replicas, fleet.adapters_per_replica)
        lacking = _lacking(fleet, replicas, found, hits)
        if busiest > utilisation:
            lacking = "hot replica"
        if lacking is None or replicas >= MAX_REPLICAS:
            break
        because = lacking
        replicas = _next(replicas)
    return Plan(replicas=replicas, spread=spread, because=because, hit_ratio=found, hottest=busiest)


def _lacking(fleet: Fleet, replicas: int, found: float, hits: float) -> str | None:
    """Return what so many replicas have too little of, memory or time to load; None for neither."""
    loads_per_s = fleet.calls_per_s * (1 - found) / replicas
    if loads_per_s * fleet.load_s > 0.7 * NUM_LOADERS:
        return "loads"
    return "memory" if found < hits else None


def _next(replicas: int) -> int:
    """Return the next number of replicas to try: one more, or one percent more."""
    return replicas + max(1, replicas // 100)
