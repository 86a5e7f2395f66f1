"""Paged decode attention equals a few lines of torch: compiled on a GPU, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorary.server.engine.paged_decode import STRETCH, paged_decode
from tests.server.ops_cases import TOLERANCE, compile_for_gpus

pytest.importorskip("triton", reason="Triton has no wheel for this system")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# With a card they are tests of that card: pytest -m gpu.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def reference(
    q: torch.Tensor,
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """k and v are one [length, kv_heads, dim] per sequence."""
    rows = []
    for query, keys, values in zip(q.float(), k, v, strict=True):
        first = 0 if window is None else max(0, len(keys) - window)
        group = query.shape[0] // keys.shape[1]
        wide = keys[first:].float().repeat_interleave(group, 1)
        scores = torch.einsum("hd,phd->hp", query, wide) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores, -1)
        wide = values[first:].float().repeat_interleave(group, 1)
        rows.append(torch.einsum("hp,phd->hd", weights, wide))
    return torch.stack(rows)


class Cache:
    """Sequences scattered over blocks; whatever belongs to none of them is not a number."""

    def __init__(
        self, lengths: list[int], kv_heads: int, dim: int, block: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        counts = [-(-length // block) for length in lengths]
        numbers = iter(torch.randperm(sum(counts) + 3, generator=generator).tolist())
        shape = (sum(counts) + 3, kv_heads, block, dim)
        self.k, self.v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.table = torch.full((len(lengths), max(counts)), 10**6, dtype=torch.int32)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            owned = [next(numbers) for _ in range(count)]
            self.table[row, :count] = torch.tensor(owned, dtype=torch.int32)
            for cache, kept in ((self.k, self.keys), (self.v, self.values)):
                values = torch.randn(length, kv_heads, dim, generator=generator).to(dtype)
                kept.append(values)
                for position in range(length):
                    cache[owned[position // block], :, position % block] = values[position]
        self.k, self.v = self.k.to(DEVICE, dtype), self.v.to(DEVICE, dtype)
        self.table = self.table.to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def check(self, q: torch.Tensor, *, dtype: torch.dtype, **options: Any) -> None:
        scale = q.shape[-1] ** -0.5
        out = paged_decode(q, self.k, self.v, self.table, self.lengths, scale, **options)
        options = {"window": None, "softcap": None, **options}
        expected = reference(q.cpu(), self.keys, self.values, scale, **options)
        assert (out.dtype, out.shape) == (dtype, q.shape)
        assert (out.cpu().float() - expected).abs().max() <= TOLERANCE[dtype]


def queries(rows: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows as they come out of a fused q/k/v product: with a gap after each."""
    wide = torch.randn(rows, heads + 2, dim, generator=torch.Generator().manual_seed(rows))
    return wide.to(DEVICE, dtype)[:, :heads]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(2, 1, 16), (2, 3, 80), (1, 8, 64)])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 2.0), (7, 3.0)])
def test_equals_the_reference(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    dim: int,
    block: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Lengths below and above a tile, in one stretch."""
    cache = Cache([1, block, 83], kv_heads, dim, block, dtype)
    q = queries(3, kv_heads * group, dim, dtype)
    cache.check(q, dtype=dtype, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 30, 300])
def test_long_sequences_are_put_together_from_stretches(
    dtype: torch.dtype, window: int | None
) -> None:
    cache = Cache([2 * STRETCH + 9, 3, STRETCH, STRETCH + 1], 1, 16, 16, dtype)
    cache.check(queries(4, 2, 16, dtype), dtype=dtype, window=window)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("window", [None, 30])
def test_row_does_not_depend_on_its_company(dtype: torch.dtype, window: int | None) -> None:
    """Alone in a narrow table, and beside a sequence of several stretches: the same bits."""
    cache = Cache([50, 2 * STRETCH + 9, 200], 2, 16, 16, dtype)
    q = queries(3, 4, 16, dtype)
    together = paged_decode(q, cache.k, cache.v, cache.table, cache.lengths, 0.25, window)
    for row, blocks in ((0, 4), (2, 13), (1, cache.table.shape[1])):
        one = slice(row, row + 1)
        table = cache.table[one, :blocks]
        alone = paged_decode(q[one], cache.k, cache.v, table, cache.lengths[one], 0.25, window)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("longest", [20, STRETCH + 5])
def test_row_without_positions_gets_zeros(longest: int) -> None:
    """What fills up the batch of a captured launch."""
    cache = Cache([longest, 1], 1, 16, 16, torch.float32)
    cache.lengths[1] = 0
    q = queries(2, 2, 16, torch.float32)
    out = paged_decode(q, cache.k, cache.v, cache.table, cache.lengths, 0.25)
    assert out[1].count_nonzero() == 0
    assert out[0].isfinite().all()


COMPILE = """
for capability, name, dim in ((80, "bf16", 128), (80, "fp16", 64), (80, "fp32", 64), (90, "bf16", 128)):
    for one in (True, False):
        constants = dict(GROUP=4, HEADS=16, DIM=dim, BLOCK=16, STRETCH=256, TILE=64, HAS_WINDOW=True,
                         HAS_SOFTCAP=True, ONE=one, DOT=LANGUAGE[name])
        signature = dict(q=f"*{name}", k=f"*{name}", v=f"*{name}", out=f"*{name}" if one else "*fp32", peaks="*fp32",
                         totals="*fp32", block_table="*i32", lengths="*i32", scale="fp32", softcap="fp32",
                         **dict.fromkeys("window q_row q_head table_row num_stretches kv_heads dim".split(), "i32"))
        compile(paged_kernels.stretches, signature, constants, capability)
    signature = dict(parts="*fp32", peaks="*fp32", totals="*fp32", out=f"*{name}", lengths="*i32",
                     **dict.fromkeys("window num_stretches heads dim".split(), "i32"))
    compile(paged_kernels.combine, signature, dict(DIM=dim, STRETCH=256, HAS_WINDOW=True), capability)
"""


def test_kernels_compile_for_gpus() -> None:
    made = compile_for_gpus("from lorary.server.engine import paged_kernels\n" + COMPILE)
    assert len(made) == 12
