"""Steps of a real engine, one by one on this thread: any number of rows, over any adapters.

The engine is the server's own (``assemble``), its registry and adapters are real; only its thread is
not started, so that a step is a call that can be timed and taken apart.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness.stopwatch import Stopwatch
from lorary.bases.load import load_model, load_tokenizer
from lorary.errors import Cancelled
from lorary.server.adapters.residency import BaseLease
from lorary.server.engine import engine as engine_module
from lorary.server.engine.assemble import EngineLimits, assemble
from lorary.server.engine.request import Execution, Lease, Output, Request, Sampling
from lorary.server.metrics import ServerMetrics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.bases import Base
    from lorary.registry import Registry
    from lorary.server.engine.assemble import Assembled

LAYERS, HEAD = "layers (native)", "head, likeliest tokens (native)"
NATIVE = (LAYERS, HEAD)
PARTS = (
    "take in and drop",
    "schedule",
    "build batch",
    LAYERS,
    "Python around the layers",
    HEAD,
    "answers: text, ends",
    "metrics",
    "deliver",
    "the rest of the step",
)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Median milliseconds of some steps.

    Attributes:
        overhead_ms: a whole step less what its native calls took, in steps in which nothing else was timed.
        parts_ms: each of ``PARTS``, in other steps; what wrapping them costs is in them.
    """

    overhead_ms: float
    parts_ms: dict[str, float]


class EngineSteps:
    """An assembled engine whose steps are calls.

    Args:
        assembled: not started.
        delivered: what its ``deliver`` puts outputs into.
    """

    def __init__(self, assembled: Assembled, delivered: list[Output]) -> None:
        self._delivered = delivered
        self.engine: Any = assembled.engine
        self._residency = assembled.residency
        self.merging = assembled.merging
        # What the engine's own thread does first.
        self.engine._on_thread_start()
        self._open: list[str] = []
        self._num_sent = 0

    def submit_rows(
        self,
        prompts: Sequence[Sequence[int]],
        leases: Sequence[Lease],
        *,
        max_tokens: int,
        execution: Execution = "batched",
    ) -> None:
        """Submit one request per prompt; the next steps read the prompts."""
        for prompt, lease in zip(prompts, leases, strict=True):
            self._num_sent += 1
            request_id = str(self._num_sent)
            self._open.append(request_id)
            self.engine.submit(
                Request(
                    request_id=request_id,
                    prompt_ids=list(prompt),
                    sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
                    lease=lease,
                    execution=execution,
                    arrived_s=time.monotonic(),
                )
            )
        self.engine._wait_for_work()

    def read_prompts(self) -> None:
        """Step until every sequence decodes."""
        while not self.is_decoding:
            self.step()

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence has its place, and its prompt behind it."""
        running = self.engine._scheduler.running
        return not (self.engine.num_waiting or any(s.is_prefilling for s in running))

    def step(self) -> float:
        """Make one step as the engine's loop does; return its seconds.

        Raises:
            RuntimeError: nobody runs or waits, so the loop would wait for ever.
        """
        engine = self.engine
        if not (engine.num_running or engine.num_waiting):
            raise RuntimeError("every answer has ended; there is no step to make")
        with torch.inference_mode():
            started = time.perf_counter()
            engine._wait_for_work()
            engine._step()
            return time.perf_counter() - started

    def time_steps(self, count: int) -> list[float]:
        """Make steps; return the seconds of each.

        Raises:
            RuntimeError: an answer ended meanwhile, so that the later ones had fewer rows.
        """
        rows = self.engine.num_running
        seconds = [self.step() for _ in range(count)]
        if self.engine.num_running != rows:
            raise RuntimeError(
                f"of {rows} rows {rows - self.engine.num_running} ended while {count} steps were timed; let "
                "their answers have more tokens"
            )
        return seconds

    def end_rows(self) -> None:
        """Drop what runs, as a cancel would.

        Raises:
            LoraryError: what a request ended with instead.
        """
        self.engine._drop(set(self._open))
        self._open.clear()
        errors = [o.error for o in self._delivered if o.error is not None]
        self._delivered.clear()
        for error in errors:
            if not isinstance(error, Cancelled):
                raise error

    def close(self) -> None:
        """Give everything back."""
        self.engine.shutdown()
        if self.merging is not None:
            self.merging.close()
        self._residency.close()


class Stepper(EngineSteps):
    """The engine over a real base and a registry's adapters, on a CPU whose kernels run its layers.

    Args:
        base: the base.
        registry: has every adapter that ``start_rows`` names.
        dtype: of the engine.
        int8: 8-bit weights.
        max_rows: most sequences at once.
        adapter_memory_bytes: for adapters.
        merge_memory_bytes: for a merged copy of one of them.
    """

    def __init__(
        self,
        base: Base,
        registry: Registry,
        *,
        dtype: torch.dtype,
        int8: bool,
        max_rows: int,
        adapter_memory_bytes: int,
        merge_memory_bytes: int = 0,
    ) -> None:
        self._registry = registry
        delivered: list[Output] = []
        self._loop = loop = asyncio.new_event_loop()

        def deliver(outputs: list[Output]) -> None:
            delivered.extend(outputs)
            # As in a server, where the loop then hands them out.
            loop.call_soon_threadsafe(_done)

        assembled = assemble(
            model=load_model(base, dtype=dtype, device="cpu"),
            tokenizer=load_tokenizer(base),
            card=base.card,
            registry=registry,
            limits=EngineLimits(
                max_batch=max_rows,
                max_context=1024,
                # Rows begin together: nobody is far ahead when the last prompt has been read.
                prefill_beside=0,
                adapter_memory_bytes=adapter_memory_bytes,
                merge_memory_bytes=merge_memory_bytes,
                prefix_cache=False,
                draft_rows=0,
            ),
            dtype=dtype,
            int8=int8,
            deliver=deliver,
            engine_observer=ServerMetrics(),
            base_folder=base.path,
        )
        if assembled.fused is None:
            raise RuntimeError(f"the layers of '{base.name}' do not run natively on this machine")
        super().__init__(assembled, delivered)

    def load(self, adapters: Sequence[str]) -> None:
        """Make adapters resident."""
        for name in adapters:
            self._residency.load(self._registry.resolve(name))

    def start_rows(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        *,
        max_tokens: int,
        execution: Execution = "batched",
    ) -> None:
        """Submit one request per prompt; the next steps read the prompts."""
        leases = [self._lease(adapter, execution) for adapter in adapters]
        self.submit_rows(prompts, leases, max_tokens=max_tokens, execution=execution)

    def step(self) -> float:
        """Make one step as the engine's loop does; return its seconds."""
        seconds = super().step()
        self._loop.run_until_complete(_nothing())
        return seconds

    def profile(self, count: int) -> StepTimes:
        """Take twice ``count`` steps apart.

        A step calls each function that is timed once, so that timing it does not show: what is called for
        every row is in the part that calls it.
        """
        engine = self.engine
        runner = engine._runner
        native = [(runner.fused, "_function", LAYERS), (runner.fused, "_largest_function", HEAD)]
        steps = self._timed(native, count)
        overhead = statistics.median(step[PARTS[-1]] for step in steps)
        others = [
            (engine, "_wait_for_work"),
            (engine._scheduler, "next_batch"),
            (engine_module, "build_batch"),
            (runner, "forward"),
            (engine._answers, "of_step"),
            (engine, "_record"),
            (engine, "_deliver"),
        ]
        names = [part for part in PARTS[:-1] if part not in NATIVE]
        parts = [(*where, part) for where, part in zip(others, names, strict=True)]
        steps = self._timed([*native, *parts], count)
        return StepTimes(
            overhead_ms=1e3 * overhead,
            parts_ms={
                part: 1e3 * statistics.median(step.get(part, 0.0) for step in steps)
                for part in PARTS
            },
        )

    def _timed(
        self, functions: Sequence[tuple[Any, str, str]], count: int
    ) -> list[dict[str, float]]:
        """Return the seconds of these parts in each of ``count`` steps, and of the rest."""
        watch = Stopwatch()
        found: list[dict[str, float]] = []
        try:
            for owner, attribute, part in functions:
                watch.wrap(owner, attribute, part)
            for _ in range(count):
                with watch.part(PARTS[-1]):
                    super().step()
                found.append(watch.take())
                self._loop.run_until_complete(_nothing())
        finally:
            watch.unwrap()
        return found

    def close(self) -> None:
        """Give everything back."""
        super().close()
        self._loop.close()

    def _lease(self, adapter: str | None, execution: Execution) -> Lease:
        if adapter is None:
            return BaseLease()
        resolved = self._registry.resolve(adapter)
        lease = self._residency.acquire(resolved)
        if not lease.is_ready:
            raise RuntimeError(f"adapter '{adapter}' is not resident; load it first")
        return lease if self.merging is None else self.merging.hold(resolved, lease, execution)


def _done() -> None:
    """What the event loop is woken up for."""


async def _nothing() -> None:
    """Let an event loop come to what it was woken up for."""


def make_library(registry: Registry, base: Base, scratch: Path, count: int, rank: int) -> list[str]:
    """Push ``count`` adapters of this rank; return their names."""
    from benchmarks.library import Member, fill

    made = [Member(f"step-{k:02d}", rank, k) for k in range(count)]
    fill(registry, base, made, scratch)
    return [member.name for member in made]
