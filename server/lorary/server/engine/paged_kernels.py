"""Attention of one query per sequence over a paged cache, as Triton kernels (see ``paged_decode``).

A sequence's positions are cut into stretches of ``STRETCH``, counted from its beginning; one program
goes through a stretch for all the query heads that share a key/value head, ``TILE`` positions at a
time, and a second kernel puts the stretches together in ascending order. Neither depends on the
other sequences, the table's width or the size of a block, so neither do a row's bits.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["table_row", "num_stretches"])
def stretches(
    q,  # [B, heads, dim], rows q_row and heads q_head apart
    k,  # [blocks, kv_heads, BLOCK, dim]
    v,
    out,  # [B, heads, dim] where there is ONE stretch, else float32 [B, heads, num_stretches, dim]
    peaks,  # float32 [B, heads, num_stretches]: the largest score; unused where there is ONE
    totals,  # float32, likewise: the sum of exp(score - peak)
    block_table,  # int32 [B, table_row]
    lengths,  # int32 [B]
    scale,
    softcap,
    window,
    q_row,
    q_head,
    table_row,
    num_stretches,
    kv_heads,
    dim,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP and dim as powers of two, at least 16
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ONE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Softmax-weighted values of one stretch, not yet divided by their total weight."""
    row, kv_head, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    start = stretch * STRETCH
    stop = tl.minimum(start + STRETCH, length)
    low = start
    if HAS_WINDOW:
        low = tl.maximum(start, length - window)
    if not ONE:  # noqa: SIM102  (decided when it is compiled; the other when it runs)
        if low >= stop:
            return
    g, d = tl.arange(0, HEADS), tl.arange(0, DIM)
    head = kv_head * GROUP + g
    has_head = (g < GROUP)[:, None] & (d < dim)[None, :]
    at_q = q + row * q_row + head[:, None] * q_head + d[None, :]
    query = tl.load(at_q, mask=has_head, other=0.0).to(DOT)
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, DIM), tl.float32)
    # Tiles begin at multiples of TILE, whatever the window hides.
    for first in range(low // TILE * TILE, stop, TILE):
        n = first + tl.arange(0, TILE)
        is_seen = (n >= low) & (n < stop)
        block = tl.load(block_table + row * table_row + n // BLOCK, mask=is_seen, other=0)
        place = ((block.to(tl.int64) * kv_heads + kv_head) * BLOCK + n % BLOCK) * dim
        keys = tl.load(
            k + place[None, :] + d[:, None], mask=is_seen[None, :] & (d < dim)[:, None], other=0.0
        )
        scores = tl.dot(query, keys.to(DOT), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 2 / (1 + e^-2x) - 1
            scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * _LOG2_E / softcap))) - 1.0)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        fade = tl.exp2((peak - new_peak) * _LOG2_E)
        weights = tl.exp2((scores - new_peak[:, None]) * _LOG2_E)
        values = tl.load(
            v + place[:, None] + d[None, :], mask=is_seen[:, None] & (d < dim)[None, :], other=0.0
        )
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        sums = tl.dot(weights.to(DOT), values.to(DOT), sums, input_precision="ieee")
        peak = new_peak
    at = row * kv_heads * GROUP + head
    if ONE:
        # A sequence of no positions, such as a row that only fills up a batch, gets zeros.
        sums = sums / tl.where(total > 0, total, 1.0)[:, None]
        at_out = out + at[:, None] * dim + d[None, :]
        tl.store(at_out, sums.to(out.dtype.element_ty), mask=has_head)
    else:
        at = at * num_stretches + stretch
        tl.store(out + at[:, None] * dim + d[None, :], sums, mask=has_head)
        tl.store(peaks + at, peak, mask=g < GROUP)
        tl.store(totals + at, total, mask=g < GROUP)


@triton.jit(do_not_specialize=["num_stretches"])
def combine(
    parts,  # float32 [B, heads, num_stretches, dim]
    peaks,  # float32 [B, heads, num_stretches]
    totals,
    out,  # [B, heads, dim]
    lengths,  # int32 [B]
    window,
    num_stretches,
    heads,
    dim,
    DIM: tl.constexpr,
    STRETCH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Put a sequence's stretches together, in ascending order."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(0, length - window)
    d = tl.arange(0, DIM)
    at = row * heads + head
    peak = float("-inf")
    total = 0.0
    sums = tl.zeros((DIM,), tl.float32)
    for stretch in range(low // STRETCH, tl.cdiv(length, STRETCH)):
        here = at * num_stretches + stretch
        peak_here = tl.load(peaks + here)
        new_peak = tl.maximum(peak, peak_here)
        fade = tl.exp2((peak - new_peak) * _LOG2_E)
        weight = tl.exp2((peak_here - new_peak) * _LOG2_E)
        part = tl.load(parts + here * dim + d, mask=d < dim, other=0.0)
        sums = sums * fade + part * weight
        total = total * fade + tl.load(totals + here) * weight
        peak = new_peak
    sums = sums / tl.where(total > 0, total, 1.0)
    tl.store(out + at * dim + d, sums.to(out.dtype.element_ty), mask=d < dim)
