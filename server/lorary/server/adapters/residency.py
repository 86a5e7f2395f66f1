"""Who is on the device, who is coming, who must go.

States of a digest::

    (absent) → LOADING → RESIDENT → (absent)      eviction, or unload when nobody holds it
                  └→ FAILED                       forgotten, but for the error (``failures``)
    RESIDENT → UNLOADING → (absent)               unload while held; a new holder brings it back

Loads run on a few worker threads and are shared by everybody who asks for the same digest; nobody
who has what it needs ever waits for one. A load takes the copy in host memory (``host_tier``) where there
is one, else the registry's files; an eviction leaves such a copy. A version that is held (``num_holders``
> 0) or pinned is never evicted; among the others ``eviction`` chooses.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from lorary.errors import Cancelled, IncompatibleAdapter, LoraryError, StorageError, Unavailable
from lorary.server.adapters.eviction import Eviction
from lorary.server.adapters.failures import RecentFailures
from lorary.server.adapters.host_copy import copy_bytes, copy_in, copy_out
from lorary.server.adapters.host_tier import HostTier
from lorary.server.adapters.leases import AdapterLease, BaseLease
from lorary.server.adapters.load_times import LoadTimes
from lorary.server.adapters.resident import HotAdapter, Resident, ResidentAdapter, State
from lorary.server.adapters.transfer import Transfers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from lorary.registry import Resolved
    from lorary.server.adapters.host_tier import HostStats
    from lorary.server.adapters.load_times import Source
    from lorary.server.adapters.loader import LoadedAdapter
    from lorary.server.adapters.pool import AdapterPool
    from lorary.server.adapters.probe_runs import Verdict
    from lorary.server.adapters.verification import Verifier

__all__ = [
    "AdapterLease",
    "BaseLease",
    "Residency",
    "ResidencyObserver",
    "ResidentAdapter",
    "State",
]

logger = logging.getLogger(__name__)


class ResidencyObserver(Protocol):
    """Who is told of loads and evictions; called on worker threads."""

    def on_load(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """A load ended."""
        ...

    def on_evict(self, cause: str) -> None:
        """A version left the device: ``memory`` or ``unload``."""
        ...


class Residency:
    """Adapters on the device, by digest, within the pool's bytes.

    Args:
        pool: where they lie.
        load: reads a version; runs on a worker thread.
        scale_columns: computes DoRA's column scales from the base, per module float32 [out]; likewise.
        on_change: called after a load ended, from a worker thread (wakes the engine).
        observer: told of loads and evictions.
        num_workers: loads that may be under way at once.
        verifier: replays golden probes of what was loaded; None does not.
        host_memory_bytes: for copies in host memory; 0 keeps none.
        failed_load_ttl_s: how long a load that failed is not tried again.
    """

    def __init__(
        self,
        *,
        pool: AdapterPool,
        load: Callable[[Resolved], LoadedAdapter],
        on_change: Callable[[], None],
        scale_columns: Callable[[LoadedAdapter], Mapping[str, torch.Tensor]] | None = None,
        observer: ResidencyObserver | None = None,
        num_workers: int = 2,
        verifier: Verifier | None = None,
        host_memory_bytes: int = 0,
        failed_load_ttl_s: float = 5.0,
    ) -> None:
        self._verifier = verifier
        self._pool = pool
        self._load = load
        self._scale_columns = scale_columns
        self._on_change = on_change
        self._observer = observer
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._residents: dict[str, Resident] = {}
        self._failures = RecentFailures(failed_load_ttl_s)
        self._eviction = Eviction()
        self._times = LoadTimes()
        self._host = HostTier(
            host_memory_bytes, self._times, on_device=self._residents.__contains__
        )
        self._transfers = Transfers(pool.device)
        self._workers = ThreadPoolExecutor(
            num_workers,
            thread_name_prefix="adapter-load",
            initializer=self._transfers.prepare_thread,
        )
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
            resident.may_evict = True
            resident.num_holders += 1
            return AdapterLease(resident, self.release)

    def prefetch(self, resolved: Resolved) -> None:
        """Begin to load a version that nobody needs yet; returns at once.

        It is given up when all memory is held by others: a load that somebody waits for must not queue
        behind it.

        Raises:
            LoraryError: what a load of this digest failed with a moment ago.
            Unavailable: the server is going down.
        """
        with self._lock:
            resident = self._find_or_start(resolved)
            resident.may_evict = resident.is_prefetched = True

    def check_fits(self, ranks: Mapping[str, int]) -> None:
        """Check that versions can be on the device together; ``ranks`` by digest.

        Raises:
            IncompatibleAdapter: they take more than the pool has beside what else is pinned.
        """
        needed = sum(self._pool.pages_for(rank) for rank in ranks.values())
        with self._lock:
            pinned = sum(
                len(r.pages)
                for r in self._residents.values()
                if r.pinned and r.resolved.digest not in ranks
            )
        if needed > self._pool.num_pages - pinned:
            raise IncompatibleAdapter(
                f"{len(ranks)} adapters together take {needed * self._pool.page_bytes} bytes; this "
                f"server gives adapters {self._pool.memory_bytes} bytes, of which "
                f"{pinned * self._pool.page_bytes} are pinned by others. Name fewer, raise "
                "--adapter-memory, or unload a pinned adapter."
            )

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
            resident.may_evict = True
            if pin and not resident.pinned:
                resident.pinned = True
                self._tell("pinned", resident)
            resident.num_waiters += 1
        try:
            if not resident.done.wait(timeout_s):
                raise Unavailable(
                    f"'{resolved.name}@{resolved.version}' is still loading after {timeout_s} s; "
                    "the load goes on"
                )
        finally:
            with self._lock:
                # Who has waited in vain still wants it: the load goes on.
                resident.num_waiters -= resident.done.is_set()
        if resident.error is not None:
            raise resident.error
        with self._lock:
            return self._describe(resident)

    def readmit(self, digest: str) -> None:
        """Forget what was found wrong with a version, so that the next call loads and checks it anew."""
        if self._verifier is not None:
            self._verifier.forget(digest)
        with self._lock:
            self._failures.forget(digest)

    def verdict(self, digest: str) -> Verdict | None:
        """Return what came of a version's golden probes; None when they have not run."""
        return None if self._verifier is None else self._verifier.verdict(digest)

    def verdicts(self) -> dict[str, Verdict]:
        """Return all verdicts that are remembered, by digest."""
        return {} if self._verifier is None else self._verifier.verdicts()

    def quarantined(self) -> tuple[str, ...]:
        """Return the digests that are refused until they are readmitted."""
        return () if self._verifier is None else self._verifier.quarantine.digests()

    def unload(self, digest: str) -> ResidentAdapter | None:
        """Free a version when its last holder ends; None when it is not here.

        Its copy in host memory goes, too, and so does what is remembered of a load that failed.
        """
        self._host.drop(digest)
        with self._lock:
            self._failures.forget(digest)
            resident = self._residents.get(digest)
            if resident is None:
                return None
            resident.pinned = False
            if resident.entry is None:
                # A load under way is let to its end: somebody asked for it, and it can be evicted.
                return self._describe(resident)
            if resident.is_free:
                self._remove(resident, "unload")
                return None
            resident.state = "unloading"
            self._tell("unloading", resident)
            return self._describe(resident)

    def demote(self, digest: str) -> bool:
        """Evict a version now, leaving its copy in host memory; False when it is held, pinned or absent."""
        with self._lock:
            resident = self._residents.get(digest)
            if resident is None or resident.pinned or not resident.is_free:
                return False
            resident.is_copying = True
        return self._leave(resident)

    def release(self, lease: AdapterLease, resident: Resident) -> None:
        """Give back one hold (through ``AdapterLease.release``)."""
        with self._lock:
            if not lease.mark_released():
                return
            resident.num_holders -= 1
            resident.last_used_s = time.monotonic()
            self._settle(resident)

    def snapshot(self) -> list[ResidentAdapter]:
        """Return every version that is here, coming or going, by name and version."""
        with self._lock:
            found = [self._describe(r) for r in self._residents.values()]
        return sorted(found, key=lambda r: (r.name, r.version))

    def warm(self, hot: HotAdapter) -> bool:
        """Load a version that nobody has asked for yet; blocks. False when no memory is free for it.

        It is pinned and counts as used as it was.

        Raises:
            LoraryError: why it could not be loaded.
        """
        digest = hot.resolved.digest
        with self._lock:
            is_new = digest not in self._residents
            resident = self._find_or_start(hot.resolved)
            resident.may_evict = resident.may_evict and not is_new
            self._eviction.use(digest, max(0, hot.uses - 1))
            resident.num_waiters += 1
        resident.done.wait()
        with self._lock:
            resident.num_waiters -= 1
            if isinstance(resident.error, Cancelled):
                return False
            if resident.error is not None:
                raise resident.error
            resident.pinned = resident.pinned or hot.pinned
            return True

    def hottest_first(self) -> list[HotAdapter]:
        """Return who is on the device, the worthiest to keep first."""
        with self._lock:
            here = [d for d, r in self._residents.items() if r.entry is not None]
            ranked = self._eviction.hottest_first(here, self._density)
            return [
                HotAdapter(
                    resolved=self._residents[d].resolved,
                    pinned=self._residents[d].pinned,
                    uses=self._eviction.uses(d),
                )
                for d in ranked
            ]

    def has_copy(self, digest: str) -> bool:
        """Whether host memory has a copy."""
        return digest in self._host

    def copies(self) -> list[str]:
        """Return the digests that host memory has copies of."""
        return self._host.digests()

    def host_stats(self) -> HostStats:
        """Return what host memory holds, and how often it helped."""
        return self._host.stats()

    def close(self) -> None:
        """Let running loads end and start no others."""
        with self._lock:
            self._closed = True
            self._freed.notify_all()
        if self._verifier is not None:
            self._verifier.close()
        self._workers.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for resident in self._residents.values():
                if not resident.done.is_set():
                    # Its load was still in the workers' queue; whoever waits for it must know.
                    resident.state = "failed"
                    resident.error = Unavailable("the server is shutting down; try another replica")
                    resident.done.set()

    # -- under the lock -----------------------------------------------------------------------

    def _find_or_start(self, resolved: Resolved) -> Resident:
        if self._closed:
            raise Unavailable("the server is shutting down; try another replica")
        digest = resolved.digest
        if self._verifier is not None:
            self._verifier.quarantine.check(digest)
        resident = self._residents.get(digest)
        if resident is None:
            error = self._failures.recall(digest)
            if error is not None:
                raise error
            resident = self._residents[digest] = Resident(resolved)
            self._workers.submit(self._load_worker, resident)
            self._tell("loading", resident)
        elif resident.state == "unloading":
            resident.state = "resident"
        self._eviction.use(digest)
        resident.last_used_s = time.monotonic()
        return resident

    def _describe(self, resident: Resident) -> ResidentAdapter:
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

    def _settle(self, resident: Resident) -> None:
        """Look again at one that somebody has let go of."""
        if resident.state == "unloading" and resident.is_free:
            self._remove(resident, "unload")
        self._freed.notify_all()

    def _remove(self, resident: Resident, cause: str) -> None:
        """Free a version's pages; nobody holds it."""
        assert resident.is_free, "evicted while held"
        digest = resident.resolved.digest
        del self._residents[digest]
        self._eviction.forget(digest)
        self._pool.free(resident.pages)
        resident.entry = None
        self._freed.notify_all()
        self._tell("evicted", resident, cause)
        if self._observer is not None:
            self._observer.on_evict(cause)

    def _tell(self, kind: str, resident: Resident, why: str = "") -> None:
        if self._listener is not None:
            self._listener(kind, resident.resolved, why)

    def _forget(self, resident: Resident, error: LoraryError) -> None:
        """End a load that came to nothing."""
        digest = resident.resolved.digest
        resident.state, resident.error = "failed", error
        del self._residents[digest]
        self._eviction.forget(digest)
        self._tell("load_failed", resident, str(error))

    def _density(self, digest: str) -> float:
        """Seconds per byte that bringing a resident back would take."""
        num_bytes = len(self._residents[digest].pages) * self._pool.page_bytes
        source: Source = "host" if digest in self._host else "registry"
        return self._times.seconds(source, num_bytes) / num_bytes

    def _victim(self) -> Resident | None:
        """Return the least worthy version that nobody holds or pinned."""
        idle = [d for d, r in self._residents.items() if r.is_free and not r.pinned]
        victim = self._eviction.victim(idle, self._density)
        return None if victim is None else self._residents[victim]

    def _evict(self, victim: Resident) -> None:
        """Free one that made room for another."""
        digest = victim.resolved.digest
        self._eviction.evicted(digest, self._density(digest))
        self._remove(victim, "memory")

    def _needs_copy(self, resident: Resident) -> bool:
        if not self._host.is_on or resident.resolved.digest in self._host:
            return False
        assert resident.entry is not None, "asked about before it is loaded"
        return self._host.has_room_for(copy_bytes(self._pool, resident.entry))

    # -- worker threads -----------------------------------------------------------------------

    def _allocate(self, resident: Resident, num_rows: int) -> tuple[int, ...]:
        """Take pages, evicting what is idle, waiting for what is held.

        Raises:
            IncompatibleAdapter: it is larger than all that is not pinned.
            Cancelled: nobody wants it any more, or not so much that others should go.
            Unavailable: the server is going down.
        """
        needed = self._pool.pages_for(num_rows)
        with self._lock:
            pinned = sum(len(r.pages) for r in self._residents.values() if r.pinned)
            if needed > self._pool.num_pages - pinned:
                raise IncompatibleAdapter(
                    f"'{resident.resolved.name}' takes {num_rows} rank rows, which are "
                    f"{needed * self._pool.page_bytes} bytes; this "
                    f"server gives adapters {self._pool.memory_bytes} bytes, of which "
                    f"{pinned * self._pool.page_bytes} are pinned. Raise --adapter-memory, or "
                    "unload a pinned adapter."
                )
        while True:
            with self._lock:
                pages = self._pool.try_allocate(num_rows)
                if pages is not None:
                    return pages
                if self._closed:
                    raise Unavailable("the server is shutting down; try another replica")
                if not resident.may_evict:
                    error = Cancelled(f"no memory is free for '{resident.resolved.name}'")
                    self._forget(resident, error)
                    raise error
                victim = self._victim()
                if victim is None:
                    self._check_wanted(resident)
                    self._freed.wait(1.0)
                    continue
                if not self._needs_copy(victim):
                    self._evict(victim)
                    continue
                victim.is_copying = True
            self._leave(victim)

    def _leave(self, victim: Resident) -> bool:
        """Copy one whose ``is_copying`` was just set to host memory, then evict it; not under the lock.

        Meanwhile it may be used; False when somebody does and it stays.
        """
        digest, entry = victim.resolved.digest, victim.entry
        assert entry is not None, "freed while it is copied"
        if self._needs_copy(victim):
            try:
                with self._transfers.side():
                    self._host.put(digest, copy_out(self._pool, entry))
            except (RuntimeError, MemoryError) as error:
                # It can be read again from its files; only coming back will take longer.
                logger.warning("no copy of '%s' in host memory: %s", victim.resolved.name, error)
        with self._lock:
            victim.is_copying = False
            if victim.state == "unloading":
                self._host.drop(digest)
            elif victim.is_free and not victim.pinned:
                self._evict(victim)
                return True
            self._settle(victim)
            return False

    def _check_wanted(self, resident: Resident) -> None:
        """Raise unless somebody wants a load that has not ended; under the lock.

        Raises:
            Cancelled: nobody does.
        """
        if not resident.is_wanted:
            # Under the lock, so that whoever asks from now on starts a load of its own.
            error = Cancelled(f"nobody waits for '{resident.resolved.name}' any more")
            self._forget(resident, error)
            raise error

    def _load_worker(self, resident: Resident) -> None:
        started = time.monotonic()
        name = resident.resolved.name
        error: LoraryError | None = None
        try:
            with self._lock:
                if self._closed:
                    raise Unavailable("the server is shutting down; try another replica")
                if not resident.is_prefetched:
                    self._check_wanted(resident)
            self._bring(resident)
        except Cancelled:
            resident.done.set()
            return
        except LoraryError as raised:
            error = raised
        except Exception as raised:
            # The top of a worker thread: an error nobody foresaw fails this load and no other.
            logger.exception("loading '%s@%s' failed", name, resident.resolved.version)
            error = StorageError(
                f"'{name}@{resident.resolved.version}' could not be loaded "
                f"({type(raised).__name__}); the server's log has the details"
            )
        if error is not None:
            if self._verifier is not None:
                self._verifier.on_load_error(resident.resolved, error)
            with self._lock:
                self._forget(resident, error)
                if not self._closed:
                    self._failures.note(resident.resolved.digest, error)
        resident.done.set()
        if self._observer is not None:
            self._observer.on_load(name, time.monotonic() - started, error)
        self._on_change()
        if error is None and self._verifier is not None:
            self._verifier.after_load(resident.resolved, self.acquire)

    def _bring(self, resident: Resident) -> None:
        """Put a version on the device: from host memory where a copy is there, else from its files."""
        digest = resident.resolved.digest
        copy = self._host.get(digest) if self._host.is_on else None
        started = time.monotonic()
        adapter = None
        if copy is None:
            source: Source = "registry"
            adapter = self._load(resident.resolved)
            rank, has_columns = adapter.rank, bool(adapter.magnitudes)
        else:
            source, rank, has_columns = "host", copy.rank, copy.has_columns
        seconds = time.monotonic() - started
        pages = self._allocate(resident, self._pool.num_rows(rank, has_columns=has_columns))
        # Waiting for pages is no part of what a load takes.
        started = time.monotonic()
        try:
            with self._transfers.side():
                if adapter is None:
                    assert copy is not None
                    entry = copy_in(self._pool, pages, copy)
                else:
                    columns = None
                    if has_columns:
                        assert self._scale_columns is not None, "DoRA without the base's weights"
                        columns = self._scale_columns(adapter)
                    entry = self._pool.write(pages, rank, adapter.tensors, columns, of=adapter)
            if self._verifier is not None:
                self._verifier.before_use(resident.resolved, entry)
        except BaseException:
            self._pool.free(pages)
            raise
        seconds += time.monotonic() - started
        self._times.note(source, len(pages) * self._pool.page_bytes, seconds)
        if entry.error and copy is None:
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
