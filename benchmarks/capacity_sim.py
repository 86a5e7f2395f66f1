"""A fleet, call by call: what the closed form of ``capacity_model`` is held against.

A replica has B rows, a queue, k places for adapters (least recently used out first, none in use), and two
threads that load. A call whose adapter is not there waits for it and holds no row meanwhile. Calls come
at random (Poisson), answers take exponential times. Which replica a call goes to:

===========  ====================================================================================
random       any: a load balancer that knows nothing of adapters
two choices  the less busy of two random ones: one that looks at load only
ring         the owner of its adapter's place on a ring of hashes, or of one of d places
bounded      as ring, but the next replica on the ring while the owner is busier than 1.25 times the
             average (Mirrokni, Thorup and Zadimoghaddam 2018, "Consistent Hashing with Bounded Loads")
multiplex    Ray Serve: the less busy of two that have the adapter; if they are full, or nobody has it,
             of two of those with the fewest adapters; if they are full, anybody
===========  ====================================================================================
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.capacity_model import NUM_LOADERS, RING_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.capacity_model import Fleet

Policy = Literal["random", "two choices", "ring", "bounded", "multiplex"]
POLICIES: tuple[Policy, ...] = ("random", "two choices", "ring", "bounded", "multiplex")
BOUND = 1.25
FULL_FACTOR = 2
"""Calls that Serve gives a replica at once, over its rows (``on_ray.application``)."""
_TRIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the second half of a simulation saw.

    Attributes:
        miss_ratio: calls whose adapter was not there, and began its load.
        late_ratio: calls that waited for their adapter, because of a load of their own or another's.
        busy: rows in use, of all there are.
        hottest: rows in use on the busiest replica, of those it has.
        wait_p50_s, wait_p99_s: from arrival to a row.
        copies: replicas that hold an adapter, on average over the adapters held.
    """

    miss_ratio: float
    late_ratio: float
    busy: float
    hottest: float
    wait_p50_s: float
    wait_p99_s: float
    copies: float


class _Home:
    """An adapter on a replica."""

    __slots__ = ("ready_s", "users")

    def __init__(self, ready_s: float) -> None:
        self.ready_s = ready_s
        self.users = 0


class _Replica:
    """Rows, queue, memory and loaders of one."""

    __slots__ = ("adapters", "busy", "busy_s", "loaders", "ongoing", "queue", "since_s")

    def __init__(self) -> None:
        self.adapters: OrderedDict[int, _Home] = OrderedDict()
        self.busy = 0
        self.busy_s = 0.0
        self.since_s = 0.0
        self.loaders = [0.0] * NUM_LOADERS
        self.ongoing = 0
        self.queue: deque[int] = deque()

    def count(self, now_s: float) -> None:
        """Add up the rows' time in use until now."""
        self.busy_s += self.busy * (now_s - self.since_s)
        self.since_s = now_s


def simulate(
    fleet: Fleet, replicas: int, policy: Policy, *, spread: int = 1, calls: int, seed: int = 0
) -> Seen:
    """Run ``calls`` calls through a fleet of so many replicas; the first half warms it up.

    Args:
        fleet: what is asked of whom.
        replicas: R.
        policy: how calls find them.
        spread: d, of a ring.
        calls: how many; to be far more than there are places for adapters.
        seed: of everything random.
    """
    return _Simulation(fleet, replicas, policy, spread, calls, seed).run()


class _Simulation:
    def __init__(
        self, fleet: Fleet, replicas: int, policy: Policy, spread: int, calls: int, seed: int
    ) -> None:
        draw = np.random.default_rng(seed)
        bounds = np.cumsum(fleet.popularity())
        last = fleet.num_adapters - 1
        self._adapter: list[int] = np.minimum(
            np.searchsorted(bounds, draw.random(calls)), last
        ).tolist()
        self._arrival: list[float] = np.cumsum(
            draw.exponential(1 / fleet.calls_per_s, calls)
        ).tolist()
        self._answer_s: list[float] = draw.exponential(fleet.answer_s, calls).tolist()
        self._random = random.Random(seed)
        self._fleet = fleet
        self._replicas = [_Replica() for _ in range(replicas)]
        self._spread = spread
        self._full = FULL_FACTOR * fleet.rows
        self._route: Callable[[int], int] = {
            "random": self._at_random,
            "two choices": self._two_choices,
            "ring": self._ring_owner,
            "bounded": self._bounded,
            "multiplex": self._multiplex,
        }[policy]
        self._ongoing = 0
        # The ring: points in order, and whose they are; an adapter's places on it.
        points = max(1, RING_SIZE // replicas) * replicas
        order = np.argsort(draw.random(points))
        self._point_owner: list[int] = (order % replicas).tolist()
        self._num_points = points
        self._place: list[list[int]] = draw.integers(
            0, points, (fleet.num_adapters, spread)
        ).tolist()
        # Serve's view: who has an adapter; replicas by how many they have.
        self._holders: dict[int, set[int]] = {}
        self._by_count = [list(range(replicas))]
        self._position = list(range(replicas))
        # Ends of answers, and loads that a call waits for: (when, which call, where, whether it ends).
        self._events: list[tuple[float, int, int, bool]] = []
        self._wait: list[float] = []
        self._half = calls // 2
        self._num_missed = self._num_late = 0

    def run(self) -> Seen:
        arrival, events = self._arrival, self._events
        for call, now_s in enumerate(arrival):
            while events and events[0][0] <= now_s:
                self._happen(*heapq.heappop(events))
            if call == self._half:
                for replica in self._replicas:
                    replica.count(now_s)
                    replica.busy_s = 0.0
            self._arrive(call, now_s)
        end_s = arrival[-1]
        for replica in self._replicas:
            replica.count(end_s)
        return self._seen(end_s - arrival[self._half])

    def _seen(self, span_s: float) -> Seen:
        rows = self._fleet.rows
        shares = [replica.busy_s / (span_s * rows) for replica in self._replicas]
        held: dict[int, int] = {}
        for replica in self._replicas:
            for adapter in replica.adapters:
                held[adapter] = held.get(adapter, 0) + 1
        counted = len(self._arrival) - self._half
        waits = np.sort(np.asarray(self._wait))
        return Seen(
            miss_ratio=self._num_missed / counted,
            late_ratio=self._num_late / counted,
            busy=sum(shares) / len(shares),
            hottest=max(shares),
            wait_p50_s=float(np.quantile(waits, 0.5)),
            wait_p99_s=float(np.quantile(waits, 0.99)),
            copies=sum(held.values()) / len(held),
        )

    # -- one call's life -------------------------------------------------------------------------

    def _arrive(self, call: int, now_s: float) -> None:
        adapter = self._adapter[call]
        where = self._route(adapter)
        replica = self._replicas[where]
        replica.ongoing += 1
        self._ongoing += 1
        home = replica.adapters.get(adapter)
        if home is None:
            home = self._load(where, adapter, now_s)
            self._num_missed += call >= self._half
        else:
            replica.adapters.move_to_end(adapter)
        home.users += 1
        if home.ready_s > now_s:
            self._num_late += call >= self._half
            heapq.heappush(self._events, (home.ready_s, call, where, False))
        else:
            self._enter(call, where, now_s)

    def _load(self, where: int, adapter: int, now_s: float) -> _Home:
        replica = self._replicas[where]
        if len(replica.adapters) >= self._fleet.adapters_per_replica:
            # What is in use stays; if all is, this one is let in beside them.
            oldest = next((a for a, h in replica.adapters.items() if not h.users), None)
            if oldest is not None:
                del replica.adapters[oldest]
                self._forget(where, oldest)
        start_s = max(now_s, replica.loaders[0])
        ready_s = start_s + self._fleet.load_s
        heapq.heapreplace(replica.loaders, ready_s)
        home = replica.adapters[adapter] = _Home(ready_s)
        self._remember(where, adapter)
        return home

    def _enter(self, call: int, where: int, now_s: float) -> None:
        replica = self._replicas[where]
        if replica.busy < self._fleet.rows:
            self._start(call, where, now_s)
        else:
            replica.queue.append(call)

    def _start(self, call: int, where: int, now_s: float) -> None:
        replica = self._replicas[where]
        replica.count(now_s)
        replica.busy += 1
        if call >= self._half:
            self._wait.append(now_s - self._arrival[call])
        heapq.heappush(self._events, (now_s + self._answer_s[call], call, where, True))

    def _happen(self, now_s: float, call: int, where: int, is_end: bool) -> None:
        if not is_end:
            self._enter(call, where, now_s)
            return
        replica = self._replicas[where]
        replica.count(now_s)
        replica.busy -= 1
        replica.ongoing -= 1
        self._ongoing -= 1
        replica.adapters[self._adapter[call]].users -= 1
        if replica.queue:
            self._start(replica.queue.popleft(), where, now_s)

    # -- routers ---------------------------------------------------------------------------------

    def _at_random(self, _adapter: int) -> int:
        return self._random.randrange(len(self._replicas))

    def _two_choices(self, _adapter: int) -> int:
        return self._less_busy(range(len(self._replicas)))

    def _ring_place(self, adapter: int) -> int:
        places = self._place[adapter]
        return places[self._random.randrange(self._spread)] if self._spread > 1 else places[0]

    def _ring_owner(self, adapter: int) -> int:
        return self._point_owner[self._ring_place(adapter)]

    def _bounded(self, adapter: int) -> int:
        place = self._ring_place(adapter)
        limit = math.ceil(BOUND * (self._ongoing + 1) / len(self._replicas))
        for step in range(self._num_points):
            where = self._point_owner[(place + step) % self._num_points]
            if self._replicas[where].ongoing < limit:
                return where
        raise AssertionError("somebody is not busier than the average")

    def _multiplex(self, adapter: int) -> int:
        holders = self._holders.get(adapter)
        if holders:
            found = self._less_busy(list(holders))
            if self._replicas[found].ongoing < self._full:
                return found
        fewest = next(bucket for bucket in self._by_count if bucket)
        found = self._less_busy(fewest)
        for _ in range(_TRIES):
            if self._replicas[found].ongoing < self._full:
                break
            found = self._two_choices(adapter)
        return found

    def _less_busy(self, among: range | list[int]) -> int:
        one = among[self._random.randrange(len(among))]
        other = among[self._random.randrange(len(among))]
        return one if self._replicas[one].ongoing <= self._replicas[other].ongoing else other

    # -- what Serve knows ------------------------------------------------------------------------

    def _remember(self, where: int, adapter: int) -> None:
        self._holders.setdefault(adapter, set()).add(where)
        self._move(where, len(self._replicas[where].adapters) - 1, 1)

    def _forget(self, where: int, adapter: int) -> None:
        self._holders[adapter].discard(where)
        self._move(where, len(self._replicas[where].adapters) + 1, -1)

    def _move(self, where: int, count: int, step: int) -> None:
        """Put a replica that had ``count`` adapters among those with one more, or one fewer."""
        bucket = self._by_count[count]
        position = self._position[where]
        bucket[position] = bucket[-1]
        self._position[bucket[position]] = position
        bucket.pop()
        while len(self._by_count) <= count + step:
            self._by_count.append([])
        self._position[where] = len(self._by_count[count + step])
        self._by_count[count + step].append(where)
