"""Mixed-adapter product with torch operators: one small product per segment, any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorary.server.adapters.segments import NO_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.adapters.segments import Segment


def add_segment(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: Sequence[torch.Tensor],
    segment: Segment,
    row_scales: torch.Tensor | None = None,
    columns: Sequence[torch.Tensor] = (),
    bias: torch.Tensor | None = None,
) -> None:
    """Add one segment's adapter to ``y``, in place.

    Semantics: y[rows] += ((x[rows] @ A^T) * scales * row_scales) @ B, per member of the group; with
    column scales c then y[rows] = c * y[rows] + (1 - c) * bias.
    Shapes: y [T, sum of outs] and x [T, in] of one dtype, a [M, cap, in], b M × [cap, out_m],
    row_scales float32 [M, cap], columns M × float32 [n, out_m], bias float32 [sum of outs].
    """
    if segment.start >= 0:
        rows = slice(segment.start, segment.start + segment.length)
        x_rows, target = x[rows], y[rows]
    else:
        x_rows, target = x.index_select(0, segment.rows), y.index_select(0, segment.rows)
    first = int(segment.pool_rows[0]) if segment.is_contiguous else 0
    rank = segment.pool_rows.numel()
    offset = 0
    for m, b_m in enumerate(b):
        if segment.is_contiguous:
            # A view: the common case of pages that lie side by side copies nothing.
            a_rows, b_rows = a[m, first : first + rank], b_m[first : first + rank]
        else:
            a_rows, b_rows = _gather(a[m], segment.pool_rows), _gather(b_m, segment.pool_rows)
        t = torch.mm(x_rows, a_rows.to(x.dtype).t())
        scales = segment.scales
        if row_scales is not None:
            own = row_scales[m].index_select(0, segment.pool_rows)
            scales = own if scales is None else own * scales
        if scales is not None:
            t = (t.float() * scales).to(t.dtype)
        part = target[:, offset : offset + b_m.shape[1]]
        part.addmm_(t, b_rows.to(x.dtype))
        if segment.columns != NO_COLUMNS:
            c = columns[m][segment.columns]
            scaled = part.float() * c
            if bias is not None:
                bias_m = bias[offset : offset + b_m.shape[1]]
                scaled += bias_m - c * bias_m
            part.copy_(scaled)
        offset += b_m.shape[1]
    if segment.start < 0:
        y.index_copy_(0, segment.rows, target)


def _gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select rows; 8-bit floats as bytes, for torch selects few kinds of them."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows.view(torch.uint8).index_select(0, index).view(rows.dtype)
    return rows.index_select(0, index)
