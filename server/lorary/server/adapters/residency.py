"""Who is on the device, who is coming, who must go.

States of a digest::

    (absent) → LOADING → RESIDENT → (absent)      eviction, or unload when nobody holds it
                  └→ FAILED → (absent)            after a while; until then asked-for again fails fast
    RESIDENT → UNLOADING → (absent)               unload while held; a new holder brings it back

Loads run on a few worker threads and are shared by everybody who asks for the same digest; nobody
who has what it needs ever waits for one. A version that is held (``num_holders`` > 0) or pinned is
never evicted; the others go least recently used first.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from lorary.errors import IncompatibleAdapter, LoraryError, StorageError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lorary.registry import Resolved
    from lorary.server.adapters.pool import AdapterPool
    from lorary.server.adapters.segments import PoolEntry

logger = logging.getLogger(__name__)

State = Literal["loading", "resident", "unloading", "failed"]

# How long a failed load is remembered, so that a broken version asked for in a loop does not keep
# the disk and a worker busy.
FAILURE_MEMORY_S = 5.0


class ResidencyObserver(Protocol):
    """Who is told of loads and evictions; called on worker threads."""

    def on_load(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """A load ended."""
        ...

    def on_evict(self, cause: str) -> None:
        """A version left the device: ``memory`` or ``unload``."""
        ...


@dataclass(slots=True, eq=False)
class _Resident:
    """One digest's record; every field is guarded by the residency's lock."""

    resolved: Resolved
    state: State = "loading"
    pages: tuple[int, ...] = ()
    entry: PoolEntry | None = None
    rank: int = 0
    pinned: bool = False
    num_holders: int = 0
    last_used_s: float = 0.0
    ready_ns: int = 0
    failed_at_s: float = 0.0
    error: LoraryError | None = None
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentAdapter:
    """A version's state, for people."""

    name: str
    version: int
    digest: str
    state: State
    pinned: bool
    rank: int
    device_bytes: int
    num_holders: int
    num_pages: int = 0
    storage_error: float = 0.0
    """Largest relative error of a module's B·A that keeping it in fewer bits has brought."""


class BaseLease:
    """The lease of a request without an adapter: always ready, holds nothing."""

    digest = ""
    is_ready = True
    error: LoraryError | None = None
    entry: PoolEntry | None = None
    load_ns = 0

    def release(self) -> None:
        """Do nothing."""


class AdapterLease:
    """A hold on one resident version."""

    def __init__(self, residency: Residency, resident: _Resident) -> None:
        self._residency = residency
        self._resident = resident
        self._acquired_ns = time.monotonic_ns()
        self._was_ready = resident.entry is not None
        self._released = False

    @property
    def digest(self) -> str:
        """The version's digest."""
        return self._resident.resolved.digest

    @property
    def is_ready(self) -> bool:
        """Whether the version is on the device."""
        return self._resident.entry is not None

    @property
    def error(self) -> LoraryError | None:
        """Why the load failed, if it did."""
        return self._resident.error

    @property
    def entry(self) -> PoolEntry | None:
        """Its place in the pool once ready."""
        return self._resident.entry

    @property
    def load_ns(self) -> int:
        """Nanoseconds this holder waited for the load."""
        if self._was_ready or not self._resident.ready_ns:
            return 0
        return max(0, self._resident.ready_ns - self._acquired_ns)

    def release(self) -> None:
        """Give the hold back; a second call does nothing."""
        self._residency.release(self, self._resident)

    def mark_released(self) -> bool:
        """Return whether this is the first release; called under the residency's lock."""
        first, self._released = not self._released, True
        return first


class Residency:
    """Adapters on the device, by digest, within the pool's bytes.

    Args:
        pool: where they lie.
        load: reads a version: (largest rank, tensors per module); runs on a worker thread.
        on_change: called after a load ended, from a worker thread (wakes the engine).
        observer: told of loads and evictions.
        num_workers: loads that may be under way at once.
    """

    def __init__(
        self,
        *,
        pool: AdapterPool,
        load: Callable[[Resolved], tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]],
        on_change: Callable[[], None],
        observer: ResidencyObserver | None = None,
        num_workers: int = 2,
    ) -> None:
        self._pool = pool
        self._load = load
        self._on_change = on_change
        self._observer = observer
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._residents: dict[str, _Resident] = {}
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="adapter-load")
        self._closed = False
        self._listener: Callable[[str, Resolved, str], object] | None = None

    # -- callers ------------------------------------------------------------------------------

    def listen(self, listener: Callable[[str, Resolved, str], object]) -> None:
        """Tell ``listener`` what happens: kind (``rollout.events``), version, why.

        It is called on any thread and under the residency's lock, so it must return at once.
        """
        self._listener = listener

    def pin(self, digest: str, *, pinned: bool = True) -> ResidentAdapter | None:
        """Keep a version from being evicted, or let it be again; None when it is not here."""
        with self._lock:
            resident = self._residents.get(digest)
            if resident is None or resident.state == "failed":
                return None
            if resident.pinned != pinned:
                resident.pinned = pinned
                self._tell("pinned" if pinned else "unpinned", resident)
            return self._describe(resident)

    def acquire(self, resolved: Resolved) -> AdapterLease:
        """Hold a version, and begin to load it when it is not on the device; returns at once.

        Raises:
            LoraryError: what a load of this digest failed with a moment ago.
            Unavailable: the server is going down.
        """
        with self._lock:
            resident = self._find_or_start(resolved)
            resident.num_holders += 1
            resident.last_used_s = time.monotonic()
            return AdapterLease(self, resident)

    def load(
        self, resolved: Resolved, *, pin: bool = False, timeout_s: float | None = None
    ) -> ResidentAdapter:
        """Load a version and wait until it is on the device; blocks.

        Raises:
            LoraryError: why it could not be loaded.
            Unavailable: it is not there after ``timeout_s``.
        """
        with self._lock:
            resident = self._find_or_start(resolved)
            if pin and not resident.pinned:
                resident.pinned = True
                self._tell("pinned", resident)
        if not resident.done.wait(timeout_s):
            raise Unavailable(
                f"'{resolved.name}@{resolved.version}' is still loading after {timeout_s} s; "
                "the load goes on"
            )
        if resident.error is not None:
            raise resident.error
        with self._lock:
            return self._describe(resident)

    def unload(self, digest: str) -> ResidentAdapter | None:
        """Free a version when its last holder ends; None when it is not here."""
        with self._lock:
            resident = self._residents.get(digest)
            if resident is None or resident.state == "failed":
                return None
            resident.pinned = False
            if resident.entry is None:
                # A load under way is let to its end: somebody asked for it, and it can be evicted.
                return self._describe(resident)
            if resident.num_holders == 0:
                self._remove(resident, "unload")
                return None
            resident.state = "unloading"
            self._tell("unloading", resident)
            return self._describe(resident)

    def release(self, lease: AdapterLease, resident: _Resident) -> None:
        """Give back one hold (through ``AdapterLease.release``)."""
        with self._lock:
            if not lease.mark_released():
                return
            resident.num_holders -= 1
            resident.last_used_s = time.monotonic()
            if resident.num_holders == 0:
                if resident.state == "unloading":
                    self._remove(resident, "unload")
                self._freed.notify_all()

    def snapshot(self) -> list[ResidentAdapter]:
        """Return every version that is here, coming or going, by name and version."""
        with self._lock:
            found = [self._describe(r) for r in self._residents.values() if r.state != "failed"]
        return sorted(found, key=lambda r: (r.name, r.version))

    def close(self) -> None:
        """Let running loads end and start no others."""
        with self._lock:
            self._closed = True
            self._freed.notify_all()
        self._workers.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for resident in self._residents.values():
                if not resident.done.is_set():
                    # Its load was still in the workers' queue; whoever waits for it must know.
                    resident.state = "failed"
                    resident.error = Unavailable("the server is shutting down; try another replica")
                    resident.done.set()

    # -- under the lock -----------------------------------------------------------------------

    def _find_or_start(self, resolved: Resolved) -> _Resident:
        if self._closed:
            raise Unavailable("the server is shutting down; try another replica")
        resident = self._residents.get(resolved.digest)
        if resident is not None and resident.state == "failed":
            if time.monotonic() - resident.failed_at_s < FAILURE_MEMORY_S:
                assert resident.error is not None
                raise resident.error
            resident = None
        if resident is None:
            resident = self._residents[resolved.digest] = _Resident(resolved)
            self._workers.submit(self._load_worker, resident)
            self._tell("loading", resident)
        elif resident.state == "unloading":
            resident.state = "resident"
        return resident

    def _describe(self, resident: _Resident) -> ResidentAdapter:
        return ResidentAdapter(
            name=resident.resolved.name,
            version=resident.resolved.version,
            digest=resident.resolved.digest,
            state=resident.state,
            pinned=resident.pinned,
            rank=resident.rank,
            device_bytes=len(resident.pages) * self._pool.page_bytes,
            num_pages=len(resident.pages),
            num_holders=resident.num_holders,
            storage_error=0.0 if resident.entry is None else resident.entry.error,
        )

    def _remove(self, resident: _Resident, cause: str) -> None:
        """Free a version's pages; nobody holds it."""
        assert resident.num_holders == 0, "evicted while held"
        del self._residents[resident.resolved.digest]
        self._pool.free(resident.pages)
        resident.entry = None
        self._freed.notify_all()
        self._tell("evicted", resident, cause)
        if self._observer is not None:
            self._observer.on_evict(cause)

    def _tell(self, kind: str, resident: _Resident, why: str = "") -> None:
        if self._listener is not None:
            self._listener(kind, resident.resolved, why)

    def _evict_one(self) -> bool:
        """Free the least recently used version that nobody holds or pinned."""
        idle = [
            r
            for r in self._residents.values()
            if r.entry is not None and not r.pinned and r.num_holders == 0
        ]
        if not idle:
            return False
        self._remove(min(idle, key=lambda r: r.last_used_s), "memory")
        return True

    def _allocate(self, rank: int) -> tuple[int, ...]:
        """Take pages, evicting what is idle, waiting for what is held."""
        needed = self._pool.pages_for(rank)
        with self._lock:
            pinned = sum(len(r.pages) for r in self._residents.values() if r.pinned)
            if needed > self._pool.num_pages - pinned:
                raise IncompatibleAdapter(
                    f"an adapter of rank {rank} takes {needed * self._pool.page_bytes} bytes; this "
                    f"server gives adapters {self._pool.memory_bytes} bytes, of which "
                    f"{pinned * self._pool.page_bytes} are pinned. Raise --adapter-memory, or "
                    "unload a pinned adapter."
                )
            while True:
                pages = self._pool.try_allocate(rank)
                if pages is not None:
                    return pages
                if self._closed:
                    raise Unavailable("the server is shutting down; try another replica")
                if not self._evict_one():
                    self._freed.wait(1.0)

    # -- worker threads -----------------------------------------------------------------------

    def _load_worker(self, resident: _Resident) -> None:
        started = time.monotonic()
        name = resident.resolved.name
        error: LoraryError | None = None
        try:
            self._bring(resident)
        except LoraryError as raised:
            error = raised
        except Exception as raised:
            # The top of a worker thread: an error nobody foresaw fails this load and no other.
            logger.exception("loading '%s@%s' failed", name, resident.resolved.version)
            error = StorageError(
                f"'{name}@{resident.resolved.version}' could not be loaded "
                f"({type(raised).__name__}); the server's log has the details"
            )
        with self._lock:
            if error is not None:
                resident.state, resident.error = "failed", error
                resident.failed_at_s = time.monotonic()
                self._forget_old_failures()
                self._tell("load_failed", resident, str(error))
        resident.done.set()
        if self._observer is not None:
            self._observer.on_load(name, time.monotonic() - started, error)
        self._on_change()

    def _bring(self, resident: _Resident) -> None:
        rank, tensors = self._load(resident.resolved)
        pages = self._allocate(rank)
        try:
            entry = self._pool.write(pages, rank, tensors)
        except BaseException:
            self._pool.free(pages)
            raise
        if entry.error:
            logger.info(
                "'%s@%s' is kept in %s: a module's change is off by %.2g %% at most",
                resident.resolved.name,
                resident.resolved.version,
                str(self._pool.storage).removeprefix("torch."),
                100 * entry.error,
            )
        with self._lock:
            resident.pages, resident.rank = pages, rank
            resident.ready_ns = time.monotonic_ns()
            resident.last_used_s = time.monotonic()
            resident.state = "resident"
            # Published last: from here on steps may read the pages.
            resident.entry = entry
            self._tell("resident", resident)

    def _forget_old_failures(self) -> None:
        """Keep the record of failures bounded, whatever callers ask for."""
        now = time.monotonic()
        for digest, resident in list(self._residents.items()):
            if resident.state == "failed" and now - resident.failed_at_s >= FAILURE_MEMORY_S:
                del self._residents[digest]
