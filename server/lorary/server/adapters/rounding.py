"""What a pool keeps its rows in: the numbers, one scale per rank row, and what rounding costs."""

from __future__ import annotations

from typing import Literal

import torch

Storage = Literal["auto", "bfloat16", "int8", "fp8"]
"""How adapters are kept: as they are multiplied, in bfloat16, or in 8 bits with a scale per rank row."""

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def storage_dtype(storage: Storage, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a pool's rows for adapters that are multiplied in ``dtype``."""
    named = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    return named.get(storage, dtype)


def has_scales(dtype: torch.dtype) -> bool:
    """Whether rows of this dtype need a scale."""
    return dtype in _LARGEST


def round_rows(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round float32 rows [R, n] to ``dtype``, each to the full range of its own.

    Returns:
        The rows, and float32 [R] to multiply them by; None where the dtype needs no scale.
    """
    largest = _LARGEST.get(dtype)
    if largest is None:
        return rows.to(dtype), None
    scales = rows.abs().amax(dim=1) / largest
    # A row of zeros keeps the scale 0.
    units = (rows / scales.clamp_min(1e-30)[:, None]).clamp_(-largest, largest)
    return (units.round_() if dtype == torch.int8 else units).to(dtype), scales


def product_error(
    a: torch.Tensor, b: torch.Tensor, rounded_a: torch.Tensor, rounded_b: torch.Tensor
) -> float:
    """Return the relative error of a rounded adapter's change to the weight.

    Semantics: |B^T A - B'^T A'| / |B^T A| in the Frobenius norm; 0 for an adapter of zeros. Through products
    of rank rows, never the whole matrix: B^T A - B'^T A' = [B - B', B']^T [A, A - A'].

    Shapes: a [R, in], b [R, out], float32, and the same rounded and scaled back.
    """
    whole = ((a @ a.t()) * (b @ b.t())).sum()
    if whole <= 0:
        return 0.0
    left = torch.cat((b - rounded_b, rounded_b))
    right = torch.cat((a, a - rounded_a))
    lost = ((left @ left.t()) * (right @ right.t())).sum().clamp_min(0)
    return float((lost / whole).sqrt())
