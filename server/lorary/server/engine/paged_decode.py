"""Attention of one query per sequence over a paged cache, on a GPU.

Needs Triton: ask ``lorary.server.adapters.ops.triton_ops.load`` whether it works here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

STRETCH = 256
"""Positions that one program goes through: enough programs for a GPU from contexts of a few thousand
tokens on, even for a single sequence."""
_TILE = 64


@functools.cache
def _triton() -> tuple[Any, Any, bool]:
    """Return the kernels, Triton's language, and whether both run in the interpreter."""
    import triton

    from lorary.server.engine import paged_kernels

    is_interpreted = not isinstance(paged_kernels.stretches, triton.JITFunction)
    return paged_kernels, triton.language, is_interpreted


def paged_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend one token per sequence.

    Semantics, for query head h with key/value head h' = h // (H / Hkv), over the positions p with
    max(0, lengths[b] - window) <= p < lengths[b]::

        out[b, h] = sum_p softmax_p(cap(scale * q[b, h] . K[b, h', p])) V[b, h', p]
        K[b, h', p] = k[block_table[b, p // BLOCK], h', p % BLOCK]

    where cap(s) is softcap * tanh(s / softcap), or s. Sums are float32; the weights are rounded to
    the cache's dtype before they meet V. A sequence of length 0 gets zeros.

    Shapes: q [B, H, D] with unit stride in D, k and v [num_blocks, Hkv, BLOCK, D] contiguous and of q's
    dtype, BLOCK a power of two, block_table int32 [B, W] with unit stride in rows, lengths int32 [B] of at
    most W * BLOCK, all on one device → [B, H, D] contiguous, of q's dtype. Of the table only the blocks
    below a sequence's length are read.

    The launches depend on B and W only. A row's bits do not depend on the other rows, nor on W.
    """
    kernels, language, is_interpreted = _triton()
    rows, heads, dim = q.shape
    kv_heads, block = k.shape[1], k.shape[2]
    group = heads // kv_heads
    num_stretches = max(1, -(-block_table.shape[1] * block // STRETCH))
    is_one = num_stretches == 1
    out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    parts, peaks, totals = out, out, out
    if not is_one:
        parts = out.new_empty(rows, heads, num_stretches, dim, dtype=torch.float32)
        peaks, totals = out.new_empty(2, rows, heads, num_stretches, dtype=torch.float32)
    # The interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same.
    dot = "float32" if is_interpreted else str(q.dtype).removeprefix("torch.")
    padded_dim = max(16, 1 << (dim - 1).bit_length())
    # Triton launches on the current device.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        kernels.stretches[(rows, kv_heads, num_stretches)](
            q,
            k,
            v,
            parts,
            peaks,
            totals,
            block_table,
            lengths,
            scale,
            softcap or 0.0,
            window or 0,
            q.stride(0),
            q.stride(1),
            block_table.stride(0),
            num_stretches,
            kv_heads,
            dim,
            GROUP=group,
            HEADS=max(16, 1 << (group - 1).bit_length()),
            DIM=padded_dim,
            BLOCK=block,
            STRETCH=STRETCH,
            TILE=_TILE,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            ONE=is_one,
            DOT=getattr(language, dot),
            num_warps=4,
            num_stages=2,
        )
        if not is_one:
            kernels.combine[(rows, heads)](
                parts,
                peaks,
                totals,
                out,
                lengths,
                window or 0,
                num_stretches,
                heads,
                dim,
                DIM=padded_dim,
                STRETCH=STRETCH,
                HAS_WINDOW=window is not None,
                num_warps=4,
            )
    return out
