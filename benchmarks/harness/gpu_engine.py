"""Decode steps of Lorary's engine over a random base, with random adapters put straight into the pool."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness.gpu_base import numbered_tokenizer
from benchmarks.harness.stepper import EngineSteps
from lorary.registry import BaseCard, Registry
from lorary.server.adapters.residency import BaseLease
from lorary.server.engine.assemble import EngineLimits, assemble

if TYPE_CHECKING:
    from benchmarks.gpu_shapes import Shape
    from lorary.server.adapters.pool import AdapterPool
    from lorary.server.adapters.segments import PoolEntry
    from lorary.server.engine.request import Lease, Output

WARM_UP = 8
"""Steps that compile, allocate and settle, and are not counted."""
PREFILL = 4096
"""Prompt tokens of one step."""
_STRENGTH = 0.01
"""Standard deviation of A and B."""
_TOP = 12
"""Kernels that a profile names, those that take longest."""


class PoolLease(BaseLease):
    """An adapter that lies in the pool for as long as the engine does."""

    def __init__(self, digest: str, entry: PoolEntry) -> None:
        self.digest = digest
        self.entry = entry


class GpuSteps(EngineSteps):
    """The engine over a random base, without its thread.

    Args:
        model: changed in place.
        shape: its sizes.
        dtype: of arithmetic, adapters, keys and values.
        max_rows: most sequences at once.
        adapters: how many there are.
        rank: of each, on every linear layer.
        context: most tokens of a sequence.
        options: more of the engine's limits.
    """

    def __init__(
        self,
        model: Any,
        shape: Shape,
        *,
        dtype: torch.dtype,
        max_rows: int,
        adapters: int,
        rank: int,
        context: int,
        **options: Any,
    ) -> None:
        delivered: list[Output] = []
        self._shape = shape
        self._scratch = tempfile.TemporaryDirectory(prefix="lorary-gpu-")
        # A page of ranks may be larger than a rank: room for all of them.
        page_ranks = -(-rank // 16) * 16
        assembled = assemble(
            model=model,
            tokenizer=numbered_tokenizer(shape.vocab),
            card=_card(shape),
            registry=Registry.open(Path(self._scratch.name) / "registry", create=True),
            limits=EngineLimits(
                max_batch=max_rows,
                max_context=context,
                prefill_budget=PREFILL,
                adapter_memory_bytes=adapters * page_ranks * shape.adapter_row * dtype.itemsize,
                max_rank=rank,
                prefix_cache=False,
                draft_rows=0,
                **options,
            ),
            dtype=dtype,
            deliver=delivered.extend,
        )
        super().__init__(assembled, delivered)
        self._static = self.engine._runner.static
        pool = assembled.lora.pool
        self.leases = [
            PoolLease(f"random-{k}", _random_adapter(pool, shape, rank, seed=k))
            for k in range(adapters)
        ]

    @property
    def has_graphs(self) -> bool:
        """Whether there are captured decode steps."""
        return self._static is not None and self._static.num_ready > 0

    def use_graphs(self, *, on: bool) -> None:
        """Replay captured decode steps from now on, if the engine has any, or run every step eagerly."""
        self.engine._runner.static = self._static if on else None

    def decode(self, rows: int, *, adapters: int, prompt_tokens: int, steps: int) -> list[float]:
        """Return the seconds of ``steps`` steps in which every one of ``rows`` sequences gets a token.

        With ``adapters`` they are dealt out in turn; a step ends when its tokens are on the host. What
        was started goes on, for ``profile``; ``end_rows`` ends it.
        """
        generator = torch.Generator().manual_seed(rows)
        size = (rows, prompt_tokens)
        prompts = torch.randint(3, self._shape.vocab, size, generator=generator).tolist()
        leases: list[Lease] = [
            self.leases[row % adapters] if adapters else BaseLease() for row in range(rows)
        ]
        self.submit_rows(prompts, leases, max_tokens=2 * (steps + WARM_UP))
        self.read_prompts()
        for _ in range(WARM_UP):
            self.step()
        return self.time_steps(steps)

    def profile(self) -> dict[str, Any]:
        """Look into one more step: how many kernels it launches, what they take, and the longest ones."""
        is_cuda = torch.cuda.is_available() and self.engine._device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        kind = activity.CUDA if is_cuda else activity.CPU
        with torch.profiler.profile(activities=[kind]) as profiler:
            self.step()
            if is_cuda:
                torch.cuda.synchronize()
        events = [
            (e.self_device_time_total if is_cuda else e.self_cpu_time_total, e.count, e.key)
            for e in profiler.key_averages()
        ]
        events.sort(reverse=True)
        return {
            "launches": sum(count for _, count, _ in events),
            "device_ms": round(sum(us for us, _, _ in events) / 1e3, 4),
            "longest": [
                {"name": name[:80], "count": count, "ms": round(us / 1e3, 4)}
                for us, count, name in events[:_TOP]
            ],
        }

    def close(self) -> None:
        """Give everything back."""
        super().close()
        self._scratch.cleanup()


def _card(shape: Shape) -> BaseCard:
    """Describe the base; nothing is compared with it, for no version of a registry is loaded."""
    return BaseCard(
        name="random",
        fingerprint="sha256:" + "0" * 64,
        architecture="LlamaForCausalLM",
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        modules=shape.modules,
        head_modules=("lm_head",),
    )


def _random_adapter(pool: AdapterPool, shape: Shape, rank: int, *, seed: int) -> PoolEntry:
    """Write an adapter on every linear layer into free pages."""
    generator = torch.Generator(pool.device).manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        made = torch.empty(size, dtype=pool.dtype, device=pool.device)
        return made.normal_(0, _STRENGTH, generator=generator)

    tensors = {
        name: (draw(rank, width), draw(out, rank)) for name, (out, width) in shape.modules.items()
    }
    pages = pool.try_allocate(rank)
    assert pages is not None, "the budget was made for all of them"
    return pool.write(pages, rank, tensors)
