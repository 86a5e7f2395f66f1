"""The oracle: the semantics of the package docstring, row by row, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorary.server.adapters.segments import NO_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.adapters.segments import Segments


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: Sequence[torch.Tensor],
    segments: Segments,
    row_scales: torch.Tensor | None = None,
    columns: Sequence[torch.Tensor] = (),
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``y`` plus each row's adapter, computed in float32.

    Shapes: y [T, sum of outs], x [T, in], a [M, cap, in], b M × [cap, out_m], row_scales [M, cap],
    columns M × [n, out_m] (``GroupPool.columns``), bias [sum of outs].
    """
    result = y.float().clone()
    for row, index in enumerate(segments.adapter_of_row):
        if index < 0:
            continue
        entry, offset = segments.entries[index], 0
        for m, b_m in enumerate(b):
            for pool_row, scale in zip(entry.rows, entry.scales, strict=True):
                t = x[row].float() @ a[m, pool_row].float()
                if row_scales is not None:
                    t = t * row_scales[m, pool_row]
                result[row, offset : offset + b_m.shape[1]] += scale * t * b_m[pool_row].float()
            if entry.columns != NO_COLUMNS:
                part = slice(offset, offset + b_m.shape[1])
                bias_m = torch.zeros(b_m.shape[1]) if bias is None else bias[part]
                bias_m = bias_m.to(result)
                result[row, part] = (
                    columns[m][entry.columns] * (result[row, part] - bias_m) + bias_m
                )
            offset += b_m.shape[1]
    return result
