"""Multiply a module's B by its scale, a piece at a time: adapters of gigabytes take megabytes."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from lorary.errors import IncompatibleAdapter
from lorary.registry.safetensors_file import Array, is_finite

_PIECE: Final = 1 << 18
"""Values at a time: 2 MB as float64, which stays in a core's cache."""


def fold(name: str, b: Array, scale: float) -> tuple[Array, float]:
    """Return ``scale * b``, and the relative error that rounding it made.

    The dtype is that of ``b`` if every product is exactly representable in it, else float32.

    Args:
        name: the tensor's, for messages.
        b: float16, bfloat16 or float32, of any shape; finite.
        scale: the factor.

    Returns:
        An array of ``b``'s shape, and ‖B' - scale·B‖ / ‖scale·B‖.

    Raises:
        IncompatibleAdapter: a product is beyond float32.
    """
    folded, error = _product(b, scale, b.dtype)
    if error and b.dtype != np.float32:
        folded, error = _product(b, scale, np.dtype(np.float32))
    if not is_finite(folded):
        raise IncompatibleAdapter(
            f"tensor {name} times its scale {scale:g} is beyond float32; the adapter would give NaN"
        )
    return folded, error


def _product(b: Array, scale: float, dtype: np.dtype[Any]) -> tuple[Array, float]:
    product = np.empty(b.shape, dtype)
    source, target = b.reshape(-1), product.reshape(-1)
    is_power = math.frexp(scale)[0] == 0.5 and dtype == b.dtype == np.float32
    factor = np.float32(scale)
    lost = whole = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, source.size, _PIECE):
            piece, done = source[start : start + _PIECE], target[start : start + _PIECE]
            if is_power:
                np.multiply(piece, factor, out=done)
                if np.array_equal(done / factor, piece):
                    continue  # exact, unless it left the range of normal numbers: then below
            exact = piece.astype(np.float64) * scale
            done[:] = exact.astype(dtype)
            difference = done.astype(np.float64) - exact
            lost += float(np.dot(difference, difference))
            whole += float(np.dot(exact, exact))
    # Pieces that were exact add nothing to `whole` where others add to `lost`; the error is then above
    # the true one, never below it.
    return product, math.sqrt(lost / whole) if lost else 0.0
