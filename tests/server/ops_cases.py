"""Inputs and tolerances that the tests of every mixed-adapter product share."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import torch

from lorary.server.adapters.ops import reference
from lorary.server.adapters.rounding import round_rows
from lorary.server.adapters.segments import NO_COLUMNS, PoolEntry, Segments

# Against float32 sums of the same numbers: one rounding of the result (bf16), or of every
# intermediate (torch operators keep the rank product in the pool's dtype).
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
WIDTH = 40


def entries(ranks: list[int], capacity: int) -> list[PoolEntry]:
    """Adapters over scattered pool rows, one of them a weighted composition."""
    order = torch.randperm(capacity, generator=torch.Generator().manual_seed(1)).tolist()
    made, start = [], 0
    for i, rank in enumerate(ranks):
        rows = order[start : start + rank]
        start += rank
        if i % 2:
            rows = sorted(rows)
        scales = (1.0,) * rank if i != 1 else tuple(0.5 + j for j in range(rank))
        made.append(PoolEntry(tuple(rows), scales))
    return made


@dataclass(frozen=True, slots=True)
class Case:
    """A pool and a step: y [T, sum of outs], x [T, in], and every row's adapter."""

    y: torch.Tensor
    x: torch.Tensor
    a: torch.Tensor
    b: list[torch.Tensor]
    row_entries: list[PoolEntry | None]
    row_scales: torch.Tensor | None = None
    columns: tuple[torch.Tensor, ...] = ()
    bias: torch.Tensor | None = None

    @classmethod
    def random(
        cls,
        row_entries: list[PoolEntry | None],
        *,
        capacity: int,
        dtype: torch.dtype,
        outs: tuple[int, ...] = (48, 16, 16),
        width: int = WIDTH,
        device: str = "cpu",
        storage: torch.dtype | None = None,
    ) -> Case:
        rows = len(row_entries)
        generator = torch.Generator().manual_seed(rows)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        x, y = normal(rows, width), normal(rows, sum(outs))
        a = normal(len(outs), capacity, width, scale=1 / width)
        b = [normal(capacity, out, scale=1 / 8) for out in outs]
        if storage is None:
            return cls(y, x, a, b, row_entries)
        kept_a, scales_a = zip(*(round_rows(rows.float(), storage) for rows in a), strict=True)
        kept_b, scales_b = zip(*(round_rows(rows.float(), storage) for rows in b), strict=True)
        scales = None
        if scales_a[0] is not None:
            scales = torch.stack(
                [one * other for one, other in zip(scales_a, scales_b, strict=True)]
            )
        kept = torch.stack([rows.float() for rows in kept_a]).to(storage)
        return cls(y, x, kept, list(kept_b), row_entries, scales)

    @classmethod
    def with_columns(
        cls,
        *,
        dtype: torch.dtype,
        outs: tuple[int, ...],
        device: str,
        storage: torch.dtype | None,
        has_bias: bool,
    ) -> Case:
        """Three adapters, two of them with column scales, and base rows, over a pool of 64 rows."""
        pool = entries([5, 24, 3], 40)
        chosen = [i % 4 for i in range(9)]
        case = cls.random(
            [None] * len(chosen),
            capacity=64,
            dtype=dtype,
            outs=outs,
            device=device,
            storage=storage,
        )
        # As in a pool: rows of B that nobody's rank rows are in, read as float32.
        columns = tuple(
            b.view(torch.uint8).view(-1).view(torch.float32).view(-1, b.shape[1]) for b in case.b
        )
        generator = torch.Generator().manual_seed(7)
        last = columns[0].shape[0] - 1
        for kept in columns:
            kept[last - 1 :] = (torch.rand(2, kept.shape[1], generator=generator) + 0.5).to(device)
        pool[0] = replace(pool[0], columns=last)
        pool[2] = replace(pool[2], columns=last - 1)
        bias = torch.randn(sum(outs), generator=generator).to(device) if has_bias else None
        rows = [pool[i] if i < len(pool) else None for i in chosen]
        return replace(case, row_entries=rows, columns=columns, bias=bias)

    def without_columns(self) -> Case:
        """Return the same step with plain adapters in the place of those with column scales."""
        plain = {id(e): replace(e, columns=NO_COLUMNS) for e in self.row_entries if e is not None}
        rows = [None if e is None else plain[id(e)] for e in self.row_entries]
        return replace(self, row_entries=rows)

    def segments(self, long_from: int) -> Segments | None:
        return Segments.build(self.row_entries, device=self.x.device, long_from=long_from)

    def check(self, actual: torch.Tensor, segments: Segments) -> None:
        """Compare with the reference, and see that rows of the bare base kept their bits."""
        expected = reference.add_lora(
            self.y, self.x, self.a, self.b, segments, self.row_scales, self.columns, self.bias
        )
        scale = expected.abs().max().clamp_min(1.0)
        assert (actual.float() - expected).abs().max() <= TOLERANCE[self.x.dtype] * scale
        for row, entry in enumerate(self.row_entries):
            if entry is None:
                assert torch.equal(actual[row], self.y[row]), "a row without an adapter was touched"


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget

LANGUAGE = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16, "fp32": triton.language.float32}

def compile(kernel, signature, constants, capability):
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    print(kernel.__name__, capability, *[v for v in signature.values() if v.startswith("*")], "mma" in made.asm["ptx"])
"""


def compile_for_gpus(program: str) -> list[str]:
    """Run ``program``, which may ``compile(kernel, signature, constants, capability)``; return its lines.

    Triton compiles down to machine code without a GPU, and refuses much that its interpreter lets
    pass. In a process of its own, for in this one Triton may interpret.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", _COMPILE + program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
