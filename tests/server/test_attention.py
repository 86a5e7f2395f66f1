"""Decode attention: the native kernel, Triton's and the batched products equal a few lines of float32."""

from __future__ import annotations

import pytest
import torch

from lorary.server.engine.attention import AttentionPlan, _decode
from lorary.server.engine.blocks import BLOCK, blocks_for
from lorary.server.engine.kv_cache import KVCache, KVShape
from lorary.server.engine.paged_decode import paged_decode
from lorary.server.native import library as native

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """One row: q [H, D], k and v [Hkv, length, D] → [H, D], in float32."""
    heads, length = q.shape[0], k.shape[1]
    first = max(0, length - window) if window else 0
    out = torch.empty(q.shape)
    for h in range(heads):
        g = h * k.shape[0] // heads
        scores = k[g, first:].float() @ q[h].float() * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out[h] = torch.softmax(scores, -1) @ v[g, first:].float()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 2.0), (3, 1.5)])
@pytest.mark.parametrize("slots", [[0], [0, 1, 2], [5, 1, 3]])
@pytest.mark.parametrize("implementation", ["native", "products", "triton"])
def test_decode_equals_the_reference(
    implementation: str,
    slots: list[int],
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(len(slots))
    shape = KVShape(num_layers=1, num_kv_heads=heads[1], context=100, head_dim=16)
    cache = KVCache(shape, num_slots=6, num_blocks=30, dtype=dtype, device=CPU)
    cache.k.copy_(torch.randn(cache.k.shape))
    cache.v.copy_(torch.randn(cache.v.shape))
    # Blocks in an order that is nobody's own.
    blocks = torch.randperm(30)[:24].view(6, 4)
    for slot in reversed(range(6)):
        assert cache.take_slot(blocks[5 - slot].tolist()) == 5 - slot
    lengths = [1 + (37 * s) % 100 for s in slots]
    # As the model hands it over: heads first, so that rows are not contiguous.
    q = torch.randn(heads[0], len(slots), 16).to(dtype).transpose(0, 1)
    k, v = cache.k[0], cache.v[0]

    def contiguous(of: torch.Tensor, slot: int, length: int) -> torch.Tensor:
        parts = [of[block] for block in blocks[slot, : blocks_for(length)]]
        return torch.cat(parts, dim=1)[:, :length]

    expected = torch.stack(
        [
            reference(q[i], contiguous(k, s, n), contiguous(v, s, n), window, softcap)
            for i, (s, n) in enumerate(zip(slots, lengths, strict=True))
        ]
    )
    assert max(lengths) > 2 * BLOCK or len(slots) < 3
    row_slots = torch.tensor(slots, dtype=torch.int32)
    row_lengths = torch.tensor(lengths, dtype=torch.int32)
    if implementation == "native":
        kernels = native.load()
        assert not isinstance(kernels, str), kernels
        actual = kernels.decode_attention(
            q, k, v, cache.tables, row_slots, row_lengths, scale=0.3, softcap=softcap, window=window
        )
    else:
        plan = AttentionPlan(cache, row_slots, row_lengths - 1, len(slots), [])
        if implementation == "triton":
            table, lengths_there = plan.decode_table, plan.decode_lengths
            actual = paged_decode(q, k, v, table, lengths_there, 0.3, window, softcap)
        else:
            actual = _decode(plan, q, k, v, 0.3, window, softcap)
    assert (actual.float() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
