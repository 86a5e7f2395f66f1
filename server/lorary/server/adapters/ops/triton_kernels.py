"""The mixed-adapter product on a GPU: one launch to the rank rows, one back (semantics in ``ops``).

A program takes one tile: up to 16 rows that share an adapter. It reads exactly the adapter's rank
rows, found through the list of pool rows; what is beyond the rank is masked and costs no bytes.
Rows of the bare base are in no tile.

Order of summation: ``in`` is cut into ``SPLIT`` stretches, a constant of the group; a stretch is
summed in blocks of ``BLOCK_IN``; the stretches' sums are added in order, then the rank rows in blocks
of ``BLOCK_RANK``. Tiles have one shape whatever the step holds, and nothing is summed by atomics:
a row's bits depend on its own input and adapter, not on the rows beside it. That is so on one GPU
model with one version of Triton: another may choose other instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What changes from step to step must not choose among compiled variants: a new one takes seconds.
_STEP_ARRAYS = ["tiles", "rows", "rank_rows", "rank_scales", "row_scales"]


@triton.jit(do_not_specialize=["num_sums"], do_not_specialize_on_alignment=_STEP_ARRAYS)
def shrink(
    x,  # [T, in_features]
    a,  # [members, cap, in_features]
    t,  # float32 [SPLIT, members, num_sums]
    tiles,
    rows,
    rank_rows,
    rank_scales,
    row_scales,  # float32 [members, cap], of rows kept in 8 bits; else unused
    in_features,
    cap,
    members,
    num_sums,
    SPLIT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """t[s, m, sum of (i, j)] = scale[j] * x[row i] . A[m, p(j)], over stretch s of ``in``."""
    tile = tiles + tl.program_id(0) * 6
    count = tl.load(tile + 1)
    if count == 0:
        return
    start, first_rank, rank, first_sum = (
        tl.load(tile),
        tl.load(tile + 2),
        tl.load(tile + 3),
        tl.load(tile + 4),
    )
    member, split = tl.program_id(1) // SPLIT, tl.program_id(1) % SPLIT
    i = tl.arange(0, BLOCK_ROWS)
    has_row = (i < count)[:, None]
    row = tl.load(rows + start + i, mask=i < count, other=0).to(tl.int64)
    x_rows = x + row[:, None] * in_features
    stretch = tl.cdiv(in_features, SPLIT * BLOCK_IN) * BLOCK_IN
    low = split * stretch
    high = tl.minimum(low + stretch, in_features)
    t_member = t + (split * members + member).to(tl.int64) * num_sums + first_sum
    # The launch has as many programs as it likes for the rank; each takes every so manieth block.
    for first in range(tl.program_id(2) * BLOCK_RANK, rank, tl.num_programs(2) * BLOCK_RANK):
        j = first + tl.arange(0, BLOCK_RANK)
        is_rank = (j < rank)[None, :]
        pool_row = tl.load(rank_rows + first_rank + j, mask=j < rank, other=0).to(tl.int64)
        a_rows = a + (member.to(tl.int64) * cap + pool_row)[None, :] * in_features
        total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
        for block in range(low, high, BLOCK_IN):
            k = block + tl.arange(0, BLOCK_IN)
            some_x = tl.load(x_rows + k[None, :], mask=has_row & (k < high)[None, :], other=0.0)
            some_a = tl.load(a_rows + k[:, None], mask=is_rank & (k < high)[:, None], other=0.0)
            total = tl.dot(some_x.to(DOT), some_a.to(DOT), total, input_precision="ieee")
        scale = tl.load(rank_scales + first_rank + j, mask=j < rank, other=0.0)
        if HAS_SCALES:
            at_scales = row_scales + member.to(tl.int64) * cap + pool_row
            scale *= tl.load(at_scales, mask=j < rank, other=0.0)
        at = t_member + i[:, None] * rank + j[None, :]
        tl.store(at, total * scale[None, :], mask=has_row & is_rank)


@triton.jit(do_not_specialize=["num_sums"], do_not_specialize_on_alignment=_STEP_ARRAYS[:3])
def expand(
    y,  # [T, sum of outs], rows y_row apart
    t,  # float32 [SPLIT, members, num_sums]
    b_table,  # int64 [members], addresses of [cap, out] of type B
    blocks,  # int32 [num blocks, 4]: member, its width, first column in it, first column in y
    bias,  # float32 [sum of outs]; unused where HAS_BIAS is not set
    tiles,
    rows,
    rank_rows,
    y_row,
    members,
    num_sums,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    B: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """y[row i, columns of m] += sum over j of (sum over s of t[s, m, (i, j)]) * B[m][p(j)].

    With column scales c then y = c * y + (1 - c) * bias; whether an adapter has them is read from its
    tile, so that no step compiles anything.
    """
    tile = tiles + tl.program_id(0) * 6
    count = tl.load(tile + 1)
    if count == 0:
        return
    start, first_rank, rank, first_sum = (
        tl.load(tile),
        tl.load(tile + 2),
        tl.load(tile + 3),
        tl.load(tile + 4),
    )
    block = blocks + tl.program_id(1) * 4
    member = tl.load(block).to(tl.int64)
    # Widths and columns come from memory; the hint lets loads be as wide as for arguments.
    out = tl.multiple_of(tl.load(block + 1), ALIGN)
    c = tl.multiple_of(tl.load(block + 2), ALIGN) + tl.arange(0, BLOCK_OUT)
    y_c = tl.multiple_of(tl.load(block + 3), ALIGN) + tl.arange(0, BLOCK_OUT)
    b = tl.multiple_of(tl.load(b_table + member).to(tl.pointer_type(B)), ALIGN)
    has_column = (c < out)[None, :]
    i = tl.arange(0, BLOCK_ROWS)
    has_row = (i < count)[:, None]
    t_member = t + member * num_sums + first_sum
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        j = first + tl.arange(0, BLOCK_RANK)
        is_rank = j < rank
        at = t_member + i[:, None] * rank + j[None, :]
        some_t = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
        for split in tl.static_range(SPLIT):
            mask = has_row & is_rank[None, :]
            some_t += tl.load(at + split * members * num_sums, mask=mask, other=0.0)
        pool_row = tl.load(rank_rows + first_rank + j, mask=is_rank, other=0).to(tl.int64)
        some_b = tl.load(
            b + pool_row[:, None] * out + c[None, :], mask=is_rank[:, None] & has_column, other=0.0
        )
        # The rank's sums stay float32: B is widened, not they rounded.
        total = tl.dot(some_t, some_b.to(tl.float32), total, input_precision=PRECISION)
    row = tl.load(rows + start + i, mask=i < count, other=0).to(tl.int64)
    at_y = y + row[:, None] * y_row + y_c[None, :]
    mask = has_row & has_column
    total += tl.load(at_y, mask=mask, other=0.0).to(tl.float32)
    columns = tl.load(tile + 5).to(tl.int64)
    if columns >= 0:
        of_member = tl.load(b_table + member).to(tl.pointer_type(tl.float32))
        scale = tl.load(of_member + columns * out + c, mask=c < out, other=0.0)
        total *= scale[None, :]
        if HAS_BIAS:
            some_bias = tl.load(bias + y_c, mask=c < out, other=0.0)
            total += (some_bias - scale * some_bias)[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=mask)
