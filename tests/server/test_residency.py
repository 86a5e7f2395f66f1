"""Residency: loads are shared and stall nobody, what is held stays, what fails leaves nothing."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

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
from lorary.server.adapters.pool import AdapterPool, GroupSpec
from lorary.server.adapters.residency import Residency

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = GroupSpec(("l.q_proj",), 8, (8,))


class Registry:
    """Loads adapters of rank 8 filled with their version's number; can be told to wait or fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.rank = 8

    def load(self, resolved: Resolved) -> tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        self.calls.append(resolved.digest)
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        value = float(resolved.version)
        a = torch.full((self.rank, 8), value)
        return self.rank, {"l.q_proj": (a, torch.full((8, self.rank), value))}


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
    """A residency with room for three adapters of rank 8."""

    def __init__(self) -> None:
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
        )

    def values(self, lease: module.AdapterLease) -> set[float]:
        assert lease.entry is not None
        return set(self.pool.groups[0].a[0][list(lease.entry.rows)].flatten().tolist())


def ref(number: int) -> Resolved:
    return Resolved(name=f"a{number}", version=number, digest=f"sha256:{number:064d}", alias=None)


def wait_for(condition: object, seconds: float = 5.0) -> None:
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
    assert world.changed.wait(5)
    wait_for(lambda: all(lease.is_ready for lease in leases))
    assert world.registry.calls == [ref(1).digest]
    assert leases[0].load_ns > 0
    assert world.residency.acquire(ref(1)).load_ns == 0
    assert world.values(leases[0]) == {1.0}


def test_a_slow_load_does_not_delay_another(world: World) -> None:
    world.registry.gate.clear()
    slow = world.residency.acquire(ref(1))
    world.registry.gate.set()
    world.residency.load(ref(2))
    assert world.residency.acquire(ref(2)).is_ready
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


def test_failed_load_leaves_nothing_and_is_remembered_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.registry.failure = CorruptArtifact("bad bytes")
    lease = world.residency.acquire(ref(1))
    wait_for(lambda: lease.error is not None)
    assert world.pool.used_bytes == 0
    assert world.residency.snapshot() == []
    with pytest.raises(CorruptArtifact, match="bad bytes"):
        world.residency.acquire(ref(1))
    assert len(world.registry.calls) == 1
    world.registry.failure = None
    monkeypatch.setattr(module, "FAILURE_MEMORY_S", 0.0)
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
            wait_for(lambda lease=lease: lease.is_ready, 20)
            if world.values(lease) != {float(number)}:
                problems.append(f"{number}: {world.values(lease)}")
            lease.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
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
    world.registry.gate.set()
    closer.join(10)
    assert not closer.is_alive()
    assert isinstance(queued.error, Unavailable)
    for lease in (*busy, queued):
        lease.release()
