"""Which adapter is merged: a second set of weights that is built, checked, used and let go of.

States of the one merged copy::

    (none) → BUILDING → READY → LEAVING → (none)
                 └→ (none)       refused: remembered by digest

At most one adapter is merged at a time. A copy is built when a call asks for ``MERGED``, or, with a
``share``, when one adapter has generated at least that part of a window's tokens. It is built on a thread of
its own from the base's files (``merged``), replays the version's golden probes, and is only then used. It
leaves when nobody has used it for ``IDLE_S``; when the adapter that it was built for by its share falls under
``KEEP`` of that share; when another adapter is to be merged and nobody runs on it; when its version is
unloaded; and at once when memory runs short, before anything else is given up.

A copy that leaves is used to the end by the answers that run on it, and then freed. Only for want of memory
do they lose it in the middle: they go on beside the base's weights, after reading their tokens again, for keys
and values of merged weights are rounded otherwise; an answer that had asked for ``MERGED`` ends instead.

A request holds its version in the pool as ever, so it can always go on there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from lorary.bases.mapped import trim_heap
from lorary.errors import (
    CorruptArtifact,
    IncompatibleAdapter,
    LoraryError,
    NotMergeable,
    StorageError,
    Unavailable,
)
from lorary.server.adapters.traffic_share import TrafficShare
from lorary.server.adapters.transfer import Transfers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorary.registry import Resolved
    from lorary.server.adapters.merged import MergedWeights
    from lorary.server.adapters.probe_runs import ProbeRuns, Verdict
    from lorary.server.adapters.segments import PoolEntry
    from lorary.server.adapters.traffic_share import Window
    from lorary.server.engine.request import DeviceLease, Execution, Lease
    from lorary.server.ports import MergingLike, ResidencyLike

logger = logging.getLogger(__name__)

Cause = Literal["call", "share"]
State = Literal["building", "ready", "leaving"]

KEEP = 0.75
"""A copy that was built for its share stays until that is under this part of the threshold."""
LEAST_TOKENS = 256
"""Fewer tokens in a window say nothing about who is hot."""
IDLE_S = 60.0
"""How long a copy stays that nobody uses."""
BACKOFF_S = 60.0
"""How long nothing is merged for its share after memory ran short."""
# Callers wait for a copy that a call asked for, and nobody for the other kind.
_PRIORITY: dict[Cause, int] = {"call": 10, "share": -10}
_TICK_S = 1.0
_JOIN_S = 10.0
_MAX_REFUSED = 1024
# What would be the same the next time.
_LASTING = (IncompatibleAdapter, CorruptArtifact)


class MergeObserver(Protocol):
    """Who is told of merges; called on any thread, must not block."""

    def on_merge(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """A copy is ready, or could not be made."""
        ...

    def on_unmerge(self, cause: str) -> None:
        """A copy leaves: ``idle``, ``share``, ``replaced``, ``unload`` or ``memory``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """The merged copy, for people."""

    digest: str
    state: State
    num_bytes: int
    num_holders: int
    verdict: Verdict | None


@dataclass(slots=True, eq=False)
class _Copy:
    """One adapter's merged weights; guarded by the lock of ``Merging``.

    Attributes:
        num_holders: leases that run on it, or wait for it.
        is_taken: the worker has begun to build it.
        is_revoked: it is to be freed before its answers have ended.
        error: why it could not be made, or was lost.
    """

    resolved: Resolved
    cause: Cause
    state: State = "building"
    weights: MergedWeights | None = None
    verdict: Verdict | None = None
    num_holders: int = 0
    is_taken: bool = False
    is_revoked: bool = False
    last_used_s: float = 0.0
    error: LoraryError | None = None

    @property
    def is_usable(self) -> bool:
        """Whether an answer that has held it since before may begin to run on it."""
        return self.state != "building" and self.weights is not None and self.error is None


class Merging:
    """The merged copy of one adapter at a time. Thread-safe.

    Args:
        build: makes the weights of a version; on this object's thread.
        runs: replays a version's probes on them.
        wake: called when a copy is ready or refused (wakes the engine).
        share: part of a window's tokens from which on an adapter is merged for ``AUTO``; 0 never does.
        is_short: whether memory is short; asked every second while there is a copy.
        observer: told of merges.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        build: Callable[[Resolved], MergedWeights],
        runs: ProbeRuns,
        wake: Callable[[], None],
        share: float = 0.0,
        is_short: Callable[[], bool] = lambda: False,
        observer: MergeObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._build = build
        self._runs = runs
        self._wake = wake
        self._share = share
        self._is_short = is_short
        self._observer = observer
        self._clock = clock
        self._traffic = TrafficShare(clock=clock)
        self._changed = threading.Condition()
        self._copy: _Copy | None = None
        # Nobody runs on these any more.
        self._garbage: list[MergedWeights] = []
        self._sweeping = threading.Lock()
        self._refused: OrderedDict[str, LoraryError] = OrderedDict()
        # When memory may be there again, and when to try again what was not refused for good.
        self._short_until_s = self._retry_at_s = 0.0
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="merge", daemon=True)
        self._worker.start()

    # -- callers ------------------------------------------------------------------------------

    def hold(self, resolved: Resolved, lease: Lease, execution: Execution) -> Lease:
        """Return a lease for a request of this execution, in the place of one on its version.

        ``merged`` begins to build the copy if it is not there, and the lease is ready when it is.

        Raises:
            NotMergeable: this version cannot be merged here, with the reason.
            Unavailable: another one is merged and in use, or the server is going down. In all cases
                ``lease`` is still the caller's.
        """
        inner = cast("DeviceLease", lease)
        if execution == "batched" or (execution == "auto" and not self._share):
            return lease
        if execution == "auto":
            return MergeLease(self, resolved, inner, None)
        with self._changed:
            copy = self._demand(resolved)
            copy.num_holders += 1
            return MergeLease(self, resolved, inner, copy)

    def _demand(self, resolved: Resolved) -> _Copy:
        """Return the copy of a version, begun if need be; under the lock."""
        if self._closed:
            raise Unavailable("the server is shutting down; try another replica")
        refused = self._refused.get(resolved.digest)
        if refused is not None:
            raise refused
        copy = self._copy
        if copy is not None and copy.resolved.digest == resolved.digest and not copy.is_revoked:
            if copy.state == "leaving":
                copy.state, copy.cause = "ready", "call"
            return copy
        if self._clock() < self._short_until_s:
            raise Unavailable(
                "a merged copy was given up a moment ago because memory ran short; ask for execution AUTO or "
                "BATCHED, or retry later",
                retry_after_s=self._short_until_s - self._clock(),
            )
        if copy is not None and (copy.state == "building" or copy.num_holders):
            raise Unavailable(
                f"'{copy.resolved.name}@{copy.resolved.version}' is merged here and in use, and one adapter "
                "is at a time; ask for execution AUTO or BATCHED, or retry later",
                retry_after_s=IDLE_S,
            )
        if copy is not None:
            self._leave(copy, "replaced")
        return self._start(resolved, "call")

    def drop(self, digest: str) -> None:
        """Let a version's copy go when its running answers have ended, and forget that it was refused."""
        with self._changed:
            self._refused.pop(digest, None)
            copy = self._copy
            if copy is not None and copy.resolved.digest == digest and copy.state == "ready":
                self._leave(copy, "unload")

    def merged(self) -> MergedAdapter | None:
        """Return what is merged, or about to be."""
        with self._changed:
            copy = self._copy
            if copy is None:
                return None
            return MergedAdapter(
                digest=copy.resolved.digest,
                state=copy.state,
                num_bytes=0 if copy.weights is None else copy.weights.num_bytes,
                num_holders=copy.num_holders,
                verdict=copy.verdict,
            )

    def close(self) -> None:
        """Let a running build end, free the copy, and start no others; the engine has stopped."""
        with self._changed:
            self._closed = True
            copy = self._copy
            if copy is not None:
                copy.error = Unavailable("the server is shutting down; try another replica")
                copy.is_revoked = True
                if copy.state != "building" or not copy.is_taken:
                    self._discard(copy)
            self._changed.notify_all()
        self._runs.close()
        # A daemon: a build of minutes does not keep the process from ending.
        self._worker.join(_JOIN_S)

    # -- leases -------------------------------------------------------------------------------

    def take(self, resolved: Resolved) -> _Copy | None:
        """Hold the copy of a version for an answer, if it is ready (``MergeLease.take``)."""
        with self._changed:
            copy = self._copy
            if copy is None or copy.state != "ready" or copy.resolved.digest != resolved.digest:
                return None
            copy.num_holders += 1
            return copy

    def release(self, copy: _Copy) -> None:
        """Give back one hold (``MergeLease.release``)."""
        with self._changed:
            copy.num_holders -= 1
            copy.last_used_s = self._clock()
            if copy.state == "leaving" and not copy.num_holders:
                self._discard(copy)

    # -- the engine's thread ------------------------------------------------------------------

    def note(self, leases: Sequence[Lease]) -> None:
        """Learn for whom a pass made a token each; with a share, merge who is hot and let go of who is not."""
        if not self._share:
            return
        window = self._traffic.note(lease.digest for lease in leases)
        if window is None or window.total < LEAST_TOKENS:
            return
        known = {lease.digest: lease.resolved for lease in leases if isinstance(lease, MergeLease)}
        with self._changed:
            self._judge(window, known)

    def _judge(self, window: Window, known: dict[str, Resolved]) -> None:
        copy = self._copy
        if copy is not None and copy.cause == "share" and copy.state == "ready":
            if window.share(copy.resolved.digest) < KEEP * self._share:
                self._leave(copy, "share")
            return
        hottest = window.hottest
        is_hot = hottest in known and window.share(hottest) >= self._share
        if not is_hot or hottest in self._refused or self._closed:
            return
        if self._clock() < max(self._short_until_s, self._retry_at_s):
            return
        if copy is not None:
            if copy.state != "ready" or copy.num_holders or copy.resolved.digest == hottest:
                return
            self._leave(copy, "replaced")
        self._start(known[hottest], "share")

    @property
    def is_revoked(self) -> bool:
        """Whether the engine should leave the copy now."""
        copy = self._copy
        return copy is not None and copy.is_revoked and copy.state == "leaving"

    def revoke(self, cause: str) -> bool:
        """Take the copy from the answers that run on it; False when there is none to take.

        The engine lets go of it before its next pass and calls ``free_revoked``.
        """
        with self._changed:
            copy = self._copy
            if copy is None or copy.weights is None or copy.is_revoked:
                return False
            copy.is_revoked = True
            copy.error = Unavailable(
                f"the merged copy of '{copy.resolved.name}@{copy.resolved.version}' was given up because "
                "memory ran short; ask for execution AUTO or BATCHED, or retry later",
                retry_after_s=BACKOFF_S,
            )
            self._short_until_s = self._clock() + BACKOFF_S
            self._leave(copy, cause)
        self._wake()
        return True

    def free_revoked(self) -> None:
        """Free a copy that was taken away; no answer runs on it any more."""
        with self._changed:
            copy = self._copy
            if copy is not None and copy.is_revoked and copy.weights is not None:
                self._discard(copy)
        # At once, and not when the worker gets to it: the next pass needs the memory.
        self._sweep()

    # -- under the lock -----------------------------------------------------------------------

    def _start(self, resolved: Resolved, cause: Cause) -> _Copy:
        copy = self._copy = _Copy(resolved, cause, last_used_s=self._clock())
        self._changed.notify_all()
        return copy

    def _leave(self, copy: _Copy, cause: str) -> None:
        copy.state = "leaving"
        name = f"{copy.resolved.name}@{copy.resolved.version}"
        logger.info("the merged copy of '%s' leaves: %s", name, cause)
        if self._observer is not None:
            self._observer.on_unmerge(cause)
        if not copy.num_holders:
            self._discard(copy)

    def _discard(self, copy: _Copy) -> None:
        """Forget a copy that no answer runs on; its weights are freed soon."""
        if copy.weights is not None:
            self._garbage.append(copy.weights)
            copy.weights = None
        if self._copy is copy:
            self._copy = None
        self._changed.notify_all()

    # -- the worker ---------------------------------------------------------------------------

    def _work(self) -> None:
        Transfers.prepare_thread()
        while True:
            self._sweep()
            with self._changed:
                copy = self._copy
                if self._closed and (copy is None or copy.is_taken):
                    break
                if copy is None or copy.is_taken:
                    if not self._garbage:
                        self._changed.wait(None if copy is None else _TICK_S)
                    copy = None
                else:
                    copy.is_taken = True
            if copy is not None:
                self._make(copy)
            else:
                self._look_after()
        self._sweep()

    def _sweep(self) -> None:
        # One at a time: what the other thread has begun to free is free when this returns, too.
        with self._sweeping:
            with self._changed:
                garbage, self._garbage = self._garbage, []
            for weights in garbage:
                weights.free()
            if garbage:
                trim_heap()

    def _look_after(self) -> None:
        """Let go of a copy that nobody uses, or that takes memory which others need."""
        with self._changed:
            copy = self._copy
            if copy is None or copy.state != "ready":
                return
            if not copy.num_holders and self._clock() - copy.last_used_s >= IDLE_S:
                self._leave(copy, "idle")
                return
        if self._is_short():
            self.revoke("memory")

    def _make(self, copy: _Copy) -> None:
        started = time.monotonic()
        resolved = copy.resolved
        name = f"{resolved.name}@{resolved.version}"
        error: LoraryError | None = None
        try:
            probes = self._runs.read(resolved)
            if probes.invocation:
                raise NotMergeable(
                    f"'{name}' is active from its invocation on only, and the base's weights apply to what is "
                    "before it; use execution BATCHED."
                )
            weights = self._build(resolved)
            with self._changed:
                # From here on it may be taken away for want of memory.
                copy.weights = weights
            priority = _PRIORITY[copy.cause]
            copy.verdict = verdict = self._runs.run(
                probes,
                lambda digest: WeightsLease(digest, weights),
                priority=priority,
                execution="merged",
            )
            if verdict.state == "failed":
                raise NotMergeable(
                    f"'{name}' does not answer its golden probes once it is merged: it is "
                    f"{verdict.divergence:.3g} nats off, and at most {verdict.limit:g} are allowed here. What "
                    "the base's weights are rounded to cannot carry it; use execution BATCHED."
                )
        except LoraryError as raised:
            error = raised
        except MemoryError:
            error = StorageError(f"there was no memory to merge '{name}'; use execution BATCHED")
        except Exception as raised:
            # The top of a worker thread: an error nobody foresaw fails this copy and nothing else.
            logger.exception("merging '%s' failed", name)
            error = StorageError(f"'{name}' could not be merged ({type(raised).__name__})")
        with self._changed:
            if error is None and not copy.is_revoked:
                copy.state = "ready"
                copy.last_used_s = self._clock()
            else:
                copy.error = copy.error or error
                self._retry_at_s = self._clock() + BACKOFF_S
                if isinstance(error, _LASTING):
                    self._refused[resolved.digest] = error
                    if len(self._refused) > _MAX_REFUSED:
                        self._refused.popitem(last=False)
                error = copy.error
                self._discard(copy)
        self._tell(copy, name, time.monotonic() - started, error)
        self._wake()

    def _tell(self, copy: _Copy, name: str, seconds: float, error: LoraryError | None) -> None:
        if error is not None:
            logger.warning("'%s' is not merged: %s", name, error)
        elif copy.weights is not None and copy.verdict is not None:
            logger.info(
                "'%s' is merged: %.1f MB in %.2f s; probes: %s, divergence %.3g nats, limit %g",
                name,
                copy.weights.num_bytes / 1e6,
                seconds,
                copy.verdict.state,
                copy.verdict.divergence,
                copy.verdict.limit,
            )
        if self._observer is not None:
            self._observer.on_merge(copy.resolved.name, seconds, error)


class MergeLease:
    """A hold on a version whose answer may run on merged weights; fits where an ``AdapterLease`` does.

    Args:
        merging: whose copy it may hold.
        resolved: the version.
        inner: the hold on its place in the pool.
        copy: the copy that the answer must run on; None where it may, and need not.
    """

    def __init__(
        self, merging: Merging, resolved: Resolved, inner: DeviceLease, copy: _Copy | None
    ) -> None:
        self._merging = merging
        self.resolved = resolved
        self._inner = inner
        self._must = copy
        self._held = copy

    @property
    def digest(self) -> str:
        """The version's digest."""
        return self._inner.digest

    @property
    def is_ready(self) -> bool:
        """Whether the version is on the device, and merged if it must be."""
        return (self._must is None or self._must.is_usable) and self._inner.is_ready

    @property
    def error(self) -> LoraryError | None:
        """Why the version is not there, or not merged though it must be."""
        return self._inner.error or (None if self._must is None else self._must.error)

    @property
    def entry(self) -> PoolEntry | None:
        """Its place in the pool once ready."""
        return self._inner.entry

    @property
    def load_ns(self) -> int:
        """Nanoseconds this holder waited for the load."""
        return self._inner.load_ns

    def take(self) -> MergedWeights | None:
        """Return the merged weights that the answer runs on, held from now on; None for the base's."""
        if self._must is not None:
            # If it was revoked just now, the next step begins with letting go of it.
            return self._must.weights
        if self._held is not None and self._held.is_revoked:
            self.give_up()
        if self._held is None:
            self._held = self._merging.take(self.resolved)
        return None if self._held is None else self._held.weights

    def give_up(self) -> None:
        """Let go of a copy that was revoked."""
        held, self._held = self._held, None
        if held is not None:
            self._merging.release(held)

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        self.give_up()
        self._inner.release()


def hold_version(
    residency: ResidencyLike, merging: MergingLike | None, resolved: Any, execution: Execution
) -> Lease:
    """Hold a version as a request of this execution needs it; returns at once.

    Raises:
        LoraryError: as ``Residency.acquire`` and ``Merging.hold``; nothing is held.
    """
    lease = residency.acquire(resolved)
    if merging is None:
        return lease
    try:
        return merging.hold(resolved, lease, execution)
    except BaseException:
        lease.release()
        raise


class WeightsLease:
    """What a probe of merged weights holds: nothing; whoever runs it holds them."""

    is_ready = True
    entry: PoolEntry | None = None
    error: LoraryError | None = None
    load_ns = 0

    def __init__(self, digest: str, weights: MergedWeights) -> None:
        self.digest = digest
        self._weights: MergedWeights | None = weights

    def take(self) -> MergedWeights | None:
        """Return the weights."""
        return self._weights

    def give_up(self) -> None:
        """End the probe: the weights are about to be freed."""
        self._weights = None
        self.error = Unavailable("the merged weights were given up before they were checked")

    def release(self) -> None:
        """Do nothing."""
