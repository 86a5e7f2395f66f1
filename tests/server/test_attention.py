"""Decode attention: the native kernel and the batched products equal a few lines of float32."""

from __future__ import annotations

import pytest
import torch

from lorary.server.engine.attention import AttentionPlan, _decode
from lorary.server.engine.kv_cache import KVCache, KVShape
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
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0), (3, 1.5)])
@pytest.mark.parametrize("slots", [[0], [0, 1, 2], [3, 1, 5]])
@pytest.mark.parametrize("implementation", ["native", "products"])
def test_decode_equals_the_reference(
    implementation: str,
    slots: list[int],
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(len(slots))
    shape = KVShape(num_layers=1, num_kv_heads=heads[1], context=24, head_dim=16)
    cache = KVCache(shape, num_slots=6, dtype=dtype, device=CPU)
    cache.k.copy_(torch.randn(cache.k.shape))
    cache.v.copy_(torch.randn(cache.v.shape))
    ordered = sorted(slots)
    lengths = [1 + (7 * s) % 24 for s in ordered]
    # As the model hands it over: heads first, so that rows are not contiguous.
    q = torch.randn(heads[0], len(slots), 16).to(dtype).transpose(0, 1)
    k, v = cache.k[0], cache.v[0]
    expected = torch.stack(
        [
            reference(q[i], k[s, :, :n], v[s, :, :n], window, softcap)
            for i, (s, n) in enumerate(zip(ordered, lengths, strict=True))
        ]
    )
    row_slots = torch.tensor(ordered, dtype=torch.int32)
    row_lengths = torch.tensor(lengths, dtype=torch.int32)
    if implementation == "native":
        kernels = native.load()
        assert not isinstance(kernels, str), kernels
        actual = kernels.decode_attention(
            q, k, v, row_slots, row_lengths, scale=0.3, softcap=softcap, window=window
        )
    else:
        plan = AttentionPlan(cache, row_slots, row_lengths - 1, len(slots), [])
        actual = _decode(plan, q, k, v, 0.3, window, softcap)
    assert (actual.float() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
