"""Golden probes ride through the engine: submitted as scoring requests, their answers kept from callers.

A probe is an ordinary scoring request (its labels are the recorded top tokens), so it rides in the steps of
everybody else and nothing stops for it. Who asks says what the probes run on: the pages of a version
(``verification``), or merged weights (``merging``).
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lorary.errors import LoraryError, Unavailable
from lorary.registry.invocation import active_from
from lorary.server.adapters.probes import divergence, divergence_limit, usable_probes
from lorary.server.engine.request import Request, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lorary.registry import Resolved
    from lorary.registry.manifest import GoldenProbe, Manifest
    from lorary.server.engine.request import Execution, Lease, Output

State = Literal["passed", "failed", "no probes"]

PROBE_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a version's probes: their mean divergence, and its limit, in nats."""

    state: State
    divergence: float = 0.0
    limit: float = 0.0
    num_probes: int = 0


@dataclass(frozen=True, slots=True)
class Probes:
    """A version's probes that can be replayed here, its invocation, and the most nats that it may be off.

    Every probe of a version with an invocation holds it.
    """

    resolved: Resolved
    probes: tuple[GoldenProbe, ...]
    invocation: tuple[int, ...]
    limit: float


@dataclass(slots=True, eq=False)
class ProbeRun:
    """One version's probes under way; guarded by the lock of ``ProbeRuns``, ``on_end`` apart.

    Attributes:
        num_open: probes without an answer.
        divergences: of those with one.
        error: why a probe could not be answered.
        on_end: called once, when the last one has ended and nothing reads the adapter for it any more.
    """

    of: Probes
    on_end: Callable[[ProbeRun], None]
    num_open: int
    divergences: list[float] = field(default_factory=list)
    error: LoraryError | None = None

    @property
    def verdict(self) -> Verdict:
        """What follows from the answers."""
        mean = sum(self.divergences) / len(self.divergences)
        return Verdict(
            state="passed" if mean <= self.of.limit else "failed",
            divergence=mean,
            limit=self.of.limit,
            num_probes=len(self.of.probes),
        )


class ProbeRuns:
    """Replays probes on the engine.

    Args:
        manifest: reads a version's manifest; called on worker threads.
        kinds: types in which this server keeps and multiplies what (``divergence_limit``).
        vocab_size: ids are below it.
        max_context: most tokens of a probe and one more.
        deliver: where the engine's other outputs go.
    """

    def __init__(
        self,
        *,
        manifest: Callable[[Resolved], Manifest],
        kinds: Iterable[str],
        vocab_size: int,
        max_context: int,
        deliver: Callable[[list[Output]], None],
    ) -> None:
        self._manifest = manifest
        self._kinds = tuple(kinds)
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._deliver = deliver
        self._submit: Callable[[Request], None] | None = None
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[ProbeRun, GoldenProbe]] = {}

    def attach(self, submit: Callable[[Request], None]) -> None:
        """Say how probes get to the engine, which is made after this."""
        self._submit = submit

    def read(self, resolved: Resolved) -> Probes:
        """Return a version's probes that can be replayed here; may block on the registry.

        Raises:
            CorruptArtifact: a probe could not have been recorded on this base.
        """
        manifest = self._manifest(resolved)
        probes = usable_probes(manifest, vocab_size=self._vocab_size, max_context=self._max_context)
        limit = divergence_limit((*self._kinds, manifest.base.quantization))
        return Probes(resolved, probes, manifest.method.invocation_tokens, limit)

    def start(
        self,
        probes: Probes,
        lease: Callable[[str], Lease],
        on_end: Callable[[ProbeRun], None],
        *,
        priority: int,
        execution: Execution = "batched",
    ) -> ProbeRun:
        """Submit all probes, of which there are some; ``on_end`` is called once, whatever comes of them.

        ``lease`` makes what a probe of this name holds: its digest is the name.
        """
        assert self._submit is not None
        run = ProbeRun(probes, on_end, num_open=len(probes.probes))
        for i, probe in enumerate(probes.probes):
            # Named and salted as no other: nothing that was cached is read in place of the adapter.
            name = f"probe/{secrets.token_hex(8)}"
            with self._lock:
                self._pending[name] = (run, probe)
            try:
                self._submit(
                    Request(
                        request_id=name,
                        prompt_ids=probe.token_ids,
                        sampling=Sampling(max_tokens=1),
                        lease=lease(name),
                        labels=tuple((token,) for token in probe.top_token_ids),
                        priority=priority,
                        keep_prefix=False,
                        arrived_s=time.monotonic(),
                        deadline_s=time.monotonic() + PROBE_DEADLINE_S,
                        execution=execution,
                        salt=name,
                        active_from=active_from(probe.token_ids, probes.invocation) or 0,
                    )
                )
            except LoraryError as error:
                with self._lock:
                    self._pending.pop(name, None)
                    run.error = error
                    # Those that were submitted still end on their own.
                    run.num_open -= len(probes.probes) - i
                    is_over = run.num_open == 0
                if is_over:
                    on_end(run)
                break
        return run

    def run(
        self,
        probes: Probes,
        lease: Callable[[str], Lease],
        *,
        priority: int,
        execution: Execution = "batched",
    ) -> Verdict:
        """Replay probes and wait; when this returns or raises, no step reads the adapter for them any more.

        Raises:
            Unavailable: they could not be run.
        """
        if not probes.probes:
            return Verdict(state="no probes")
        ended = threading.Event()
        run = self.start(
            probes, lease, lambda _: ended.set(), priority=priority, execution=execution
        )
        ended.wait()
        if run.error is not None:
            resolved = probes.resolved
            raise Unavailable(
                f"the golden probes of '{resolved.name}@{resolved.version}' could not be run: "
                f"{run.error}"
            ) from run.error
        return run.verdict

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
