"""Residency: loads are shared and stall nobody, what is held stays, what fails leaves nothing."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import (
    CorruptArtifact,
    IncompatibleAdapter,
    LoraryError,
    StorageError,
    Unavailable,
)
from lorary.registry import Resolved
from lorary.server.adapters import residency as module
from lorary.server.adapters.host_copy import copy_out
from lorary.server.adapters.loader import LoadedAdapter
from lorary.server.adapters.pool import AdapterPool, GroupSpec
from lorary.server.adapters.residency import AdapterLease, Residency

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = GroupSpec(("l.q_proj",), 8, (8,))


class Registry:
    """Loads adapters of rank 8 filled with their version's number; can be told to wait or fail.

    Behind the gate, when it is shut, waits the digest ``held``, or if it is empty, every one.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.held = ""
        self.failure: Exception | None = None
        self.rank = 8
        self.seconds = 0.0

    def load(self, resolved: Resolved) -> LoadedAdapter:
        self.calls.append(resolved.digest)
        if self.held in ("", resolved.digest):
            assert self.gate.wait(60)
        if self.failure is not None:
            raise self.failure
        time.sleep(self.seconds)
        value = float(resolved.version)
        a = torch.full((self.rank, 8), value)
        pair = (a, torch.full((8, self.rank), value))
        return LoadedAdapter(rank=self.rank, tensors={"l.q_proj": pair})


class Observer:
    def __init__(self) -> None:
        self.loads: list[tuple[str, LoraryError | None]] = []
        self.evictions: list[str] = []

    def on_load(self, name: str, seconds: float, error: LoraryError | None) -> None:
        assert seconds >= 0
        self.loads.append((name, error))

    def on_evict(self, cause: str) -> None:
        self.evictions.append(cause)


class World:
    """A residency with room for three adapters of rank 8, and for so many copies in host memory."""

    def __init__(self, host_adapters: int = 0) -> None:
        row = 4 * GROUP.row_elements
        self.pool = AdapterPool(
            [GROUP], memory_bytes=3 * 8 * row, dtype=torch.float32, device=torch.device("cpu")
        )
        self.registry = Registry()
        self.observer = Observer()
        self.changed = threading.Event()
        self.residency = Residency(
            pool=self.pool,
            load=self.registry.load,
            on_change=self.changed.set,
            observer=self.observer,
            host_memory_bytes=host_adapters * 8 * row,
            failed_load_ttl_s=3600,
        )

    def values(self, lease: AdapterLease) -> set[float]:
        assert lease.entry is not None
        return set(self.pool.groups[0].a[0][list(lease.entry.rows)].flatten().tolist())


def ref(number: int) -> Resolved:
    return Resolved(name=f"a{number}", version=number, digest=f"sha256:{number:064d}", alias=None)


def wait_for(condition: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.registry.gate.set()
    made.residency.close()


def test_acquire_returns_at_once_and_loads_once(world: World) -> None:
    world.registry.gate.clear()
    leases = [world.residency.acquire(ref(1)) for _ in range(5)]
    assert not any(lease.is_ready for lease in leases)
    assert [r.state for r in world.residency.snapshot()] == ["loading"]
    world.registry.gate.set()
    assert world.changed.wait(30)
    wait_for(lambda: all(lease.is_ready for lease in leases))
    assert world.registry.calls == [ref(1).digest]
    assert leases[0].load_ns > 0
    assert world.residency.acquire(ref(1)).load_ns == 0
    assert world.values(leases[0]) == {1.0}


def test_a_slow_load_does_not_delay_another(world: World) -> None:
    world.registry.held = ref(1).digest
    world.registry.gate.clear()
    slow = world.residency.acquire(ref(1))
    world.residency.load(ref(2), timeout_s=30)
    assert world.residency.acquire(ref(2)).is_ready
    assert not slow.is_ready
    slow.release()


def test_least_recently_used_goes_first_and_holders_stay(world: World) -> None:
    held = world.residency.acquire(ref(1))
    for number in (1, 2, 3):
        world.residency.load(ref(number))
    world.residency.acquire(ref(2)).release()
    world.residency.load(ref(4))
    names = [r.name for r in world.residency.snapshot()]
    assert names == ["a1", "a2", "a4"], "a3 was used least recently; a1 is held"
    assert world.observer.evictions == ["memory"]
    assert world.values(held) == {1.0}


def test_pinned_stays(world: World) -> None:
    world.residency.load(ref(1), pin=True)
    for number in range(2, 9):
        world.residency.load(ref(number))
    assert "a1" in [r.name for r in world.residency.snapshot()]


def test_load_waits_for_memory_that_is_held(world: World) -> None:
    leases = [world.residency.acquire(ref(n)) for n in (1, 2, 3)]
    wait_for(lambda: all(lease.is_ready for lease in leases))
    fourth = world.residency.acquire(ref(4))
    time.sleep(0.05)
    assert not fourth.is_ready
    assert [world.values(lease) for lease in leases] == [{1.0}, {2.0}, {3.0}]
    leases[1].release()
    wait_for(lambda: fourth.is_ready)
    assert world.values(fourth) == {4.0}
    assert world.values(leases[0]) == {1.0}


def test_release_twice_counts_once(world: World) -> None:
    first, second = world.residency.acquire(ref(1)), world.residency.acquire(ref(1))
    first.release()
    first.release()
    (resident,) = world.residency.snapshot()
    assert resident.num_holders == 1
    second.release()


def test_unload_really_frees_once_nobody_holds_it(world: World) -> None:
    lease = world.residency.acquire(ref(1))
    world.residency.load(ref(1))
    described = world.residency.unload(ref(1).digest)
    assert described is not None
    assert described.state == "unloading"
    assert world.pool.used_bytes > 0
    lease.release()
    assert world.residency.snapshot() == []
    assert world.pool.used_bytes == 0
    assert world.residency.unload(ref(1).digest) is None


def test_new_holder_brings_back_what_was_going(world: World) -> None:
    lease = world.residency.acquire(ref(1))
    world.residency.load(ref(1))
    world.residency.unload(ref(1).digest)
    again = world.residency.acquire(ref(1))
    assert again.is_ready
    lease.release()
    assert [r.state for r in world.residency.snapshot()] == ["resident"]


def test_failed_load_leaves_nothing_and_is_remembered_a_while(world: World) -> None:
    world.registry.failure = CorruptArtifact("bad bytes")
    lease = world.residency.acquire(ref(1))
    wait_for(lambda: lease.error is not None)
    assert world.pool.used_bytes == 0
    assert world.residency.snapshot() == []
    with pytest.raises(CorruptArtifact, match="bad bytes") as caught:
        world.residency.acquire(ref(1))
    assert len(world.registry.calls) == 1
    assert caught.value.retry_after_s == pytest.approx(3600, abs=60)
    world.registry.failure = None
    assert world.residency.unload(ref(1).digest) is None
    world.residency.load(ref(1))
    assert world.residency.acquire(ref(1)).is_ready


def test_unforeseen_error_fails_one_load_only(world: World) -> None:
    world.registry.failure = RuntimeError("secret path /x")
    lease = world.residency.acquire(ref(1))
    wait_for(lambda: lease.error is not None)
    assert isinstance(lease.error, StorageError)
    assert "secret" not in str(lease.error)
    world.registry.failure = None
    world.residency.load(ref(2))


def test_adapter_larger_than_the_budget_is_refused(world: World) -> None:
    world.registry.rank = 64
    with pytest.raises(IncompatibleAdapter, match="--adapter-memory"):
        world.residency.load(ref(1))
    assert world.pool.used_bytes == 0


def test_churn_never_mixes_adapters(world: World) -> None:
    """Ten adapters over three places, six threads: whoever holds one sees its own numbers only."""
    problems: list[str] = []

    def work(seed: int) -> None:
        for i in range(60):
            number = 1 + (seed * 7 + i * 3) % 10
            lease = world.residency.acquire(ref(number))
            wait_for(lambda lease=lease: lease.is_ready, 60)
            if world.values(lease) != {float(number)}:
                problems.append(f"{number}: {world.values(lease)}")
            lease.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "deadlock"
    assert problems == []
    assert all(r.num_holders == 0 for r in world.residency.snapshot())


def test_close_tells_those_who_wait_for_a_queued_load(world: World) -> None:
    """Two workers are busy, a third load waits in their queue: closing must not leave it hanging."""
    world.registry.gate.clear()
    busy = [world.residency.acquire(ref(1)), world.residency.acquire(ref(2))]
    queued = world.residency.acquire(ref(3))
    closer = threading.Thread(target=world.residency.close)
    closer.start()
    wait_for(lambda: world.residency._closed)
    world.registry.gate.set()
    closer.join(60)
    assert not closer.is_alive()
    assert isinstance(queued.error, Unavailable)
    for lease in (*busy, queued):
        lease.release()


@pytest.fixture
def tiered() -> Iterator[World]:
    """Three places on the device, and five in host memory."""
    made = World(host_adapters=5)
    yield made
    made.registry.gate.set()
    made.residency.close()


def test_what_leaves_the_device_comes_back_from_host_memory(tiered: World) -> None:
    for number in (1, 2, 3, 4, 5):
        tiered.residency.load(ref(number))
    assert [r.version for r in tiered.residency.snapshot()] == [3, 4, 5]
    lease = tiered.residency.acquire(ref(1))
    wait_for(lambda: lease.is_ready)
    assert tiered.values(lease) == {1.0}
    assert [tiered.registry.calls.count(ref(n).digest) for n in (1, 2, 3, 4, 5)] == [1] * 5
    stats = tiered.residency.host_stats()
    assert (stats.num_adapters, stats.num_hits, stats.num_misses) == (3, 1, 5)


def test_host_memory_keeps_to_its_budget_and_adds_to_the_device(tiered: World) -> None:
    """Three on the device, five others in host memory: eight that never read the disk again."""
    for number in range(1, 9):
        tiered.residency.load(ref(number))
    assert tiered.residency.host_stats().num_adapters == 5
    for _ in range(2):
        for number in range(1, 9):
            tiered.residency.load(ref(number))
    assert len(tiered.registry.calls) == 8
    tiered.residency.load(ref(9))
    stats = tiered.residency.host_stats()
    assert stats.num_adapters == 5
    assert stats.num_bytes <= 5 * 8 * 4 * GROUP.row_elements


def test_unload_frees_host_memory_too(tiered: World) -> None:
    tiered.residency.load(ref(1))
    assert tiered.residency.demote(ref(1).digest)
    assert tiered.pool.used_bytes == 0
    assert tiered.residency.has_copy(ref(1).digest)
    tiered.residency.unload(ref(1).digest)
    assert tiered.residency.host_stats().num_bytes == 0
    tiered.residency.load(ref(1))
    assert len(tiered.registry.calls) == 2


def test_what_is_used_while_it_is_copied_stays(
    tiered: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody asks for the victim just then: it is a hit, and the copy is kept for later."""
    tiered.residency.load(ref(1))
    held: list[AdapterLease] = []

    def copy_slowly(*arguments: Any) -> Any:
        held.append(tiered.residency.acquire(ref(1)))
        return copy_out(*arguments)

    monkeypatch.setattr(module, "copy_out", copy_slowly)
    assert not tiered.residency.demote(ref(1).digest)
    assert tiered.values(held[0]) == {1.0}
    assert tiered.residency.has_copy(ref(1).digest)
    held[0].release()


def test_what_is_unloaded_while_it_is_copied_is_gone(
    tiered: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiered.residency.load(ref(1))

    def copy_slowly(*arguments: Any) -> Any:
        tiered.residency.unload(ref(1).digest)
        return copy_out(*arguments)

    monkeypatch.setattr(module, "copy_out", copy_slowly)
    tiered.residency.demote(ref(1).digest)
    assert tiered.residency.snapshot() == []
    assert tiered.pool.used_bytes == 0
    assert not tiered.residency.has_copy(ref(1).digest)


def test_a_load_that_nobody_waits_for_any_more_is_not_begun(world: World) -> None:
    """Two workers are busy; of what waits behind them, the cancelled one never reads the disk."""
    world.registry.gate.clear()
    busy = [world.residency.acquire(ref(1)), world.residency.acquire(ref(2))]
    wait_for(lambda: len(world.registry.calls) == 2)
    world.residency.acquire(ref(3)).release()
    wanted = world.residency.acquire(ref(4))
    world.registry.gate.set()
    wait_for(lambda: wanted.is_ready)
    # The other worker may not have looked at it yet.
    wait_for(lambda: ref(3).digest not in [r.digest for r in world.residency.snapshot()])
    assert ref(3).digest not in world.registry.calls
    settled = world.residency.acquire(ref(3))
    for lease in (*busy, wanted):
        lease.release()
    wait_for(lambda: settled.is_ready)


def test_what_is_prefetched_comes_although_nobody_waits(world: World) -> None:
    world.registry.gate.clear()
    busy = [world.residency.acquire(ref(1)), world.residency.acquire(ref(2))]
    wait_for(lambda: len(world.registry.calls) == 2)
    world.residency.prefetch(ref(3))
    world.registry.gate.set()
    wait_for(lambda: all(r.state == "resident" for r in world.residency.snapshot()))
    assert ref(3).digest in [r.digest for r in world.residency.snapshot()]
    third = world.residency.acquire(ref(3))
    # All memory is held: a prefetch is given up, and everybody who watches hears of it.
    told: list[tuple[str, str]] = []
    world.residency.listen(lambda kind, resolved, _why: told.append((kind, resolved.name)))
    world.residency.prefetch(ref(4))
    wait_for(lambda: told[-1:] == [("load_failed", "a4")])
    assert told[0] == ("loading", "a4")
    assert ref(4).digest not in [r.digest for r in world.residency.snapshot()]
    for lease in (*busy, third):
        lease.release()
    world.residency.load(ref(4))


def test_a_load_gives_up_waiting_for_memory_when_nobody_wants_it(world: World) -> None:
    leases = [world.residency.acquire(ref(n)) for n in (1, 2, 3)]
    wait_for(lambda: all(lease.is_ready for lease in leases))
    fourth = world.residency.acquire(ref(4))
    wait_for(lambda: ref(4).digest in world.registry.calls)
    fourth.release()
    wait_for(lambda: len(world.residency.snapshot()) == 3)
    assert [world.values(lease) for lease in leases] == [{1.0}, {2.0}, {3.0}]


def test_what_is_cheap_to_bring_back_goes_first(
    tiered: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two used alike, the one with a copy in host memory leaves the device."""
    tiered.registry.seconds = 0.05  # what a file takes
    note = tiered.residency._times.note

    def note_unhindered(source: Any, num_bytes: int, seconds: float) -> None:
        # A copy takes less on any machine, unless that stands still in the middle of it.
        note(source, num_bytes, min(seconds, 0.02) if source == "host" else seconds)

    monkeypatch.setattr(tiered.residency._times, "note", note_unhindered)
    for number in (1, 2, 3):
        tiered.residency.load(ref(number))
    tiered.residency.demote(ref(2).digest)
    tiered.residency.load(ref(2))
    tiered.residency.load(ref(4))
    assert {r.version for r in tiered.residency.snapshot()} == {1, 3, 4}
