"""Golden probes replayed on the engine: is what was just copied really that adapter, on this base?

Probes ride in the steps of everybody else (``probe_runs``): one short prompt per probe, once per digest and
process. A probe reads the adapter's pages directly, and its keys and values are shared with nobody, so that
it always tests the pages and never what was cached.

``enforce``: the load waits for the probes, and calls wait for the load; a version that fails is
quarantined, its pages are freed, and it was never used. ``warn``: calls start at once, probes run behind
everybody's back with the lowest priority, and a version that fails is served and said to have failed.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Literal, Protocol

from lorary.errors import CorruptArtifact, LoraryError
from lorary.server.adapters.probe_runs import Verdict
from lorary.server.adapters.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.registry import Resolved
    from lorary.server.adapters.probe_runs import ProbeRun, ProbeRuns
    from lorary.server.adapters.residency import AdapterLease
    from lorary.server.adapters.segments import PoolEntry

logger = logging.getLogger(__name__)

Mode = Literal["warn", "enforce"]

MAX_VERDICTS = 4096
PRIORITY = {"warn": -10, "enforce": 10}
"""With ``enforce`` calls of any priority may wait for the probes; with ``warn`` nobody does."""


class VerificationObserver(Protocol):
    """Who is told of verdicts; called on worker threads and the engine's, must not block."""

    def on_verify(self, name: str, verdict: Verdict) -> None:
        """A version's probes have run, or it has none."""
        ...


class _ProbeLease:
    """What a probe holds: nothing; whoever runs it holds the pages."""

    is_ready = True
    error: LoraryError | None = None
    load_ns = 0

    def __init__(self, digest: str, entry: PoolEntry) -> None:
        self.digest = digest
        self.entry = entry

    def release(self) -> None:
        """Do nothing."""


class Verifier:
    """Replays probes and remembers what came of them, by digest.

    Args:
        mode: what to do about a version that fails.
        runs: replays probes on the engine.
        observer: told of verdicts.
    """

    def __init__(
        self, *, mode: Mode, runs: ProbeRuns, observer: VerificationObserver | None = None
    ) -> None:
        self.quarantine = Quarantine()
        self._mode = mode
        self._runs = runs
        self._observer = observer
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()

    def verdict(self, digest: str) -> Verdict | None:
        """Return what came of a version's probes; None before they have run."""
        return self._verdicts.get(digest)

    def verdicts(self) -> dict[str, Verdict]:
        """Return what is remembered of all versions."""
        with self._lock:
            return dict(self._verdicts)

    def forget(self, digest: str) -> None:
        """Lift a quarantine, and let the next load of this digest run its probes again."""
        self.quarantine.lift(digest)
        with self._lock:
            self._verdicts.pop(digest, None)

    # -- the residency's worker threads -------------------------------------------------------

    def before_use(self, resolved: Resolved, entry: PoolEntry) -> None:
        """With ``enforce``, run the probes of a version that nobody may use yet; blocks.

        When this returns or raises, no step reads the version's pages any more.

        Raises:
            CorruptArtifact: they failed, and the digest is quarantined.
            Unavailable: they could not be run.
        """
        if self._mode != "enforce" or self._has_passed(resolved.digest):
            return
        probes = self._runs.read(resolved)
        verdict = self._runs.run(
            probes, lambda name: _ProbeLease(name, entry), priority=PRIORITY[self._mode]
        )
        self._publish(resolved, verdict)
        if verdict.state == "failed":
            raise _failure(resolved, verdict)

    def after_load(self, resolved: Resolved, acquire: Callable[[Resolved], AdapterLease]) -> None:
        """With ``warn``, begin to run the probes of a version that is resident; returns at once."""
        if self._mode != "warn" or self.verdict(resolved.digest) is not None:
            return
        try:
            probes = self._runs.read(resolved)
            lease = acquire(resolved) if probes.probes else None
        except LoraryError as error:
            if isinstance(error, CorruptArtifact):
                self._publish(resolved, Verdict(state="failed"))
            _warn_not_run(resolved, error)
            return
        if lease is None:
            self._publish(resolved, Verdict(state="no probes"))
        elif lease.entry is None:
            # Evicted or unloaded in the meantime; its next load comes here again.
            lease.release()
        else:
            entry = lease.entry
            self._runs.start(
                probes,
                lambda name: _ProbeLease(name, entry),
                lambda run: self._on_warned(run, lease),
                priority=PRIORITY[self._mode],
            )

    def on_load_error(self, resolved: Resolved, error: LoraryError) -> None:
        """With ``enforce``, quarantine a version whose content is damaged or not what it claims."""
        if self._mode == "enforce" and isinstance(error, CorruptArtifact):
            self.quarantine.add(resolved.digest, error)

    def close(self) -> None:
        """End what waits for an engine that has stopped."""
        self._runs.close()

    # -- the engine's thread ------------------------------------------------------------------

    def _on_warned(self, run: ProbeRun, lease: AdapterLease) -> None:
        lease.release()
        if run.error is not None:
            _warn_not_run(run.of.resolved, run.error)
        else:
            self._publish(run.of.resolved, run.verdict)

    # -- any thread ---------------------------------------------------------------------------

    def _has_passed(self, digest: str) -> bool:
        verdict = self.verdict(digest)
        return verdict is not None and verdict.state != "failed"

    def _publish(self, resolved: Resolved, verdict: Verdict) -> None:
        with self._lock:
            self._verdicts[resolved.digest] = verdict
            self._verdicts.move_to_end(resolved.digest)
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        if self._observer is not None:
            self._observer.on_verify(resolved.name, verdict)
        if verdict.state == "no probes":
            logger.info(
                "'%s@%s' has no golden probes that could be replayed",
                resolved.name,
                resolved.version,
            )
        elif verdict.num_probes:
            log = logger.info if verdict.state == "passed" else logger.warning
            log(
                "'%s@%s' has %s its %d golden probes: divergence %.3g nats, limit %g",
                resolved.name,
                resolved.version,
                verdict.state,
                verdict.num_probes,
                verdict.divergence,
                verdict.limit,
            )


def _warn_not_run(resolved: Resolved, error: LoraryError) -> None:
    logger.warning(
        "the golden probes of '%s@%s' could not be run: %s", resolved.name, resolved.version, error
    )


def _failure(resolved: Resolved, verdict: Verdict) -> CorruptArtifact:
    return CorruptArtifact(
        f"'{resolved.name}@{resolved.version}' does not answer its golden probes as it did in training: "
        f"it is {verdict.divergence:.3g} nats off, and at most {verdict.limit:g} are allowed here. Its "
        "tensors are not those of its manifest, or this base distorts them; it is quarantined. Push a "
        "sound version, or load it explicitly to try again."
    )
