"""Golden probes replayed on the engine: is what was just copied really that adapter, on this base?

A probe is an ordinary scoring request (its labels are the recorded top tokens), so it rides in the steps of
everybody else and nothing stops for it: one short prompt per probe, once per digest and process. It reads
the adapter's pages directly, and its keys and values are shared with nobody, so that a probe always tests
the pages and never what was cached.

``enforce``: the load waits for the probes, and calls wait for the load; a version that fails is
quarantined, its pages are freed, and it was never used. ``warn``: calls start at once, probes run behind
everybody's back with the lowest priority, and a version that fails is served and said to have failed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from lorary.errors import CorruptArtifact, LoraryError, Unavailable
from lorary.registry.invocation import active_from
from lorary.server.adapters.probes import divergence, divergence_limit, usable_probes
from lorary.server.adapters.quarantine import Quarantine
from lorary.server.engine.request import Request, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorary.registry import Resolved
    from lorary.registry.manifest import GoldenProbe, Manifest
    from lorary.server.adapters.residency import AdapterLease
    from lorary.server.adapters.segments import PoolEntry
    from lorary.server.engine.request import Output

logger = logging.getLogger(__name__)

Mode = Literal["warn", "enforce"]
State = Literal["passed", "failed", "no probes"]

MAX_VERDICTS = 4096
PRIORITY = {"warn": -10, "enforce": 10}
"""With ``enforce`` calls of any priority may wait for the probes; with ``warn`` nobody does."""
PROBE_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a version's probes: their mean divergence, and its limit, in nats."""

    state: State
    divergence: float = 0.0
    limit: float = 0.0
    num_probes: int = 0


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


@dataclass(frozen=True, slots=True)
class _Replay:
    """What is asked of a version: its probes, which all hold its invocation, and the most nats it may be off."""

    probes: tuple[GoldenProbe, ...]
    invocation: tuple[int, ...]
    limit: float


@dataclass(slots=True, eq=False)
class _Run:
    """One version's probes under way; guarded by the verifier's lock, ``ended`` apart.

    Attributes:
        num_open: probes without an answer.
        divergences: of those with one.
        error: why a probe could not be answered.
        on_end: called once, when the last one has ended and nothing reads the pages for it any more.
    """

    resolved: Resolved
    replay: _Replay
    on_end: Callable[[_Run], None]
    num_open: int
    divergences: list[float] = field(default_factory=list)
    error: LoraryError | None = None

    @property
    def verdict(self) -> Verdict:
        """What follows from the answers."""
        mean = sum(self.divergences) / len(self.divergences)
        return Verdict(
            state="passed" if mean <= self.replay.limit else "failed",
            divergence=mean,
            limit=self.replay.limit,
            num_probes=len(self.replay.probes),
        )


class Verifier:
    """Replays probes and remembers what came of them, by digest.

    Args:
        mode: what to do about a version that fails.
        manifest: reads a version's manifest; called on load workers.
        kinds: types in which this server keeps and multiplies what (``divergence_limit``).
        vocab_size: ids are below it.
        max_context: most tokens of a probe and one more.
        deliver: where the engine's other outputs go.
        observer: told of verdicts.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        manifest: Callable[[Resolved], Manifest],
        kinds: Sequence[str],
        vocab_size: int,
        max_context: int,
        deliver: Callable[[list[Output]], None],
        observer: VerificationObserver | None = None,
    ) -> None:
        self.quarantine = Quarantine()
        self._mode = mode
        self._manifest = manifest
        self._kinds = tuple(kinds)
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._deliver = deliver
        self._observer = observer
        self._submit: Callable[[Request], None] | None = None
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[_Run, GoldenProbe]] = {}
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()

    def attach(self, submit: Callable[[Request], None]) -> None:
        """Say how probes get to the engine, which is made after this."""
        self._submit = submit

    def verdict(self, digest: str) -> Verdict | None:
        """Return what came of a version's probes; None before they have run."""
        return self._verdicts.get(digest)

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
        replay = self._replay(resolved)
        if not replay.probes:
            self._publish(resolved, Verdict(state="no probes"))
            return
        ended = threading.Event()
        run = self._start(resolved, replay, entry, lambda _: ended.set())
        ended.wait()
        if run.error is not None:
            raise Unavailable(
                f"the golden probes of '{resolved.name}@{resolved.version}' could not be run: "
                f"{run.error}"
            ) from run.error
        verdict = run.verdict
        self._publish(resolved, verdict)
        if verdict.state == "failed":
            raise _failure(resolved, verdict)

    def after_load(self, resolved: Resolved, acquire: Callable[[Resolved], AdapterLease]) -> None:
        """With ``warn``, begin to run the probes of a version that is resident; returns at once."""
        if self._mode != "warn" or self.verdict(resolved.digest) is not None:
            return
        try:
            replay = self._replay(resolved)
            lease = acquire(resolved) if replay.probes else None
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
            self._start(resolved, replay, lease.entry, lambda run: self._on_warned(run, lease))

    def on_load_error(self, resolved: Resolved, error: LoraryError) -> None:
        """With ``enforce``, quarantine a version whose content is damaged or not what it claims."""
        if self._mode == "enforce" and isinstance(error, CorruptArtifact):
            self.quarantine.add(resolved.digest, error)

    def close(self) -> None:
        """End what waits for an engine that has stopped."""
        with self._lock:
            runs = {run for run, _ in self._pending.values()}
            self._pending.clear()
        for run in runs:
            run.error = Unavailable("the server is shutting down; try another replica")
            run.on_end(run)

    # -- the engine's thread ------------------------------------------------------------------

    def deliver(self, outputs: list[Output]) -> None:
        """Take the probes' outputs out of a step's, and pass the others on."""
        if not self._pending:
            self._deliver(outputs)
            return
        others = [output for output in outputs if not self._take(output)]
        if others:
            self._deliver(others)

    def _take(self, output: Output) -> bool:
        if output.request_id not in self._pending:
            return False
        with self._lock:
            run, probe = self._pending.pop(output.request_id)
            if output.finish is not None:
                run.divergences.append(divergence(probe, output.finish.label_logprobs))
            else:
                run.error = output.error
            run.num_open -= 1
            is_over = run.num_open == 0
        if is_over:
            run.on_end(run)
        return True

    def _on_warned(self, run: _Run, lease: AdapterLease) -> None:
        lease.release()
        if run.error is not None:
            _warn_not_run(run.resolved, run.error)
        else:
            self._publish(run.resolved, run.verdict)

    # -- any thread ---------------------------------------------------------------------------

    def _has_passed(self, digest: str) -> bool:
        verdict = self.verdict(digest)
        return verdict is not None and verdict.state != "failed"

    def _replay(self, resolved: Resolved) -> _Replay:
        manifest = self._manifest(resolved)
        probes = usable_probes(manifest, vocab_size=self._vocab_size, max_context=self._max_context)
        limit = divergence_limit((*self._kinds, manifest.base.quantization))
        return _Replay(probes, manifest.method.invocation_tokens, limit)

    def _start(
        self,
        resolved: Resolved,
        replay: _Replay,
        entry: PoolEntry,
        on_end: Callable[[_Run], None],
    ) -> _Run:
        """Submit all probes; ``on_end`` is called once, whatever comes of them."""
        assert self._submit is not None
        probes = replay.probes
        run = _Run(resolved, replay, on_end, num_open=len(probes))
        for i, probe in enumerate(probes):
            # Named and salted as no other: nothing that was cached is read in place of the version's pages.
            name = f"probe/{secrets.token_hex(8)}"
            with self._lock:
                self._pending[name] = (run, probe)
            try:
                self._submit(
                    Request(
                        request_id=name,
                        prompt_ids=probe.token_ids,
                        sampling=Sampling(max_tokens=1),
                        lease=_ProbeLease(name, entry),
                        labels=tuple((token,) for token in probe.top_token_ids),
                        priority=PRIORITY[self._mode],
                        keep_prefix=False,
                        arrived_s=time.monotonic(),
                        deadline_s=time.monotonic() + PROBE_DEADLINE_S,
                        salt=name,
                        active_from=active_from(probe.token_ids, replay.invocation) or 0,
                    )
                )
            except LoraryError as error:
                with self._lock:
                    self._pending.pop(name, None)
                    run.error = error
                    # Those that were submitted still end on their own.
                    run.num_open -= len(probes) - i
                    is_over = run.num_open == 0
                if is_over:
                    on_end(run)
                break
        return run

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
