"""Steps of a real engine, one by one on this thread: any number of rows, over any adapters.

The engine is the server's own (``assemble``), its registry and adapters are real; only its thread is
not started, so that a step is a call that can be timed and taken apart.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.harness.stopwatch import Stopwatch
from lorary.bases.load import load_model, load_tokenizer
from lorary.errors import Cancelled
from lorary.server.adapters.residency import BaseLease
from lorary.server.engine import answering
from lorary.server.engine import engine as engine_module
from lorary.server.engine.assemble import EngineLimits, assemble
from lorary.server.engine.detokenizer import TextStream
from lorary.server.engine.request import Execution, Lease, Output, Request, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from lorary.bases import Base
    from lorary.registry import Registry

LAYERS, HEAD = "layers (native)", "head (native)"
NATIVE = (LAYERS, HEAD)
PARTS = (
    "schedule",
    "build batch",
    LAYERS,
    "Python around the layers",
    HEAD,
    "sampling",
    "detokenize",
    "deliver",
    "the rest of the step",
)


class Stepper:
    """An engine without its thread.

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
        self._delivered: list[Output] = []
        assembled = assemble(
            model=load_model(base, dtype=dtype, device="cpu"),
            tokenizer=load_tokenizer(base),
            card=base.card,
            registry=registry,
            limits=EngineLimits(
                max_batch=max_rows,
                max_context=1024,
                adapter_memory_bytes=adapter_memory_bytes,
                merge_memory_bytes=merge_memory_bytes,
                prefix_cache=False,
                draft_rows=0,
            ),
            dtype=dtype,
            int8=int8,
            deliver=self._delivered.extend,
            base_folder=base.path,
        )
        if assembled.fused is None:
            raise RuntimeError(f"the layers of '{base.name}' do not run natively on this machine")
        self.engine: Any = assembled.engine
        self._residency = assembled.residency
        self.merging = assembled.merging
        # What the engine's own thread does first.
        self.engine._on_thread_start()
        self._open: list[str] = []
        self._num_sent = 0

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
        for prompt, adapter in zip(prompts, adapters, strict=True):
            self._num_sent += 1
            request_id = str(self._num_sent)
            self._open.append(request_id)
            self.engine.submit(
                Request(
                    request_id=request_id,
                    prompt_ids=list(prompt),
                    sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
                    lease=self._lease(adapter, execution),
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
        """Make one step; return its seconds."""
        started = time.perf_counter()
        self.engine._step()
        return time.perf_counter() - started

    def profile(self, count: int) -> dict[str, float]:
        """Return the median milliseconds of each of ``PARTS`` over ``count`` steps."""
        watch = Stopwatch()
        engine = self.engine
        runner = engine._runner
        watch.wrap(engine._scheduler, "next_batch", PARTS[0])
        watch.wrap(engine_module, "build_batch", PARTS[1])
        watch.wrap(runner, "forward", PARTS[3])
        watch.wrap(answering, "sample", PARTS[5])
        watch.wrap(TextStream, "push", PARTS[6])
        watch.wrap(engine, "_deliver", PARTS[7])
        watch.wrap(runner.fused, "_function", LAYERS)
        watch.wrap(runner.model.get_output_embeddings().packed, "linear", HEAD)
        found: list[dict[str, float]] = []
        try:
            for _ in range(count):
                with watch.part(PARTS[-1]):
                    engine._step()
                found.append(watch.take())
        finally:
            watch.unwrap()
        return {
            part: 1e3 * statistics.median(step.get(part, 0.0) for step in found) for part in PARTS
        }

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

    def _lease(self, adapter: str | None, execution: Execution) -> Lease:
        if adapter is None:
            return BaseLease()
        resolved = self._registry.resolve(adapter)
        lease = self._residency.acquire(resolved)
        if not lease.is_ready:
            raise RuntimeError(f"adapter '{adapter}' is not resident; load it first")
        return lease if self.merging is None else self.merging.hold(resolved, lease, execution)


def make_library(registry: Registry, base: Base, scratch: Path, count: int, rank: int) -> list[str]:
    """Push ``count`` adapters of this rank; return their names."""
    from benchmarks.library import Member, fill

    made = [Member(f"step-{k:02d}", rank, k) for k in range(count)]
    fill(registry, base, made, scratch)
    return [member.name for member in made]
