"""Memory that costs nothing until it is written."""

from __future__ import annotations

import math
import mmap

import torch


def lazy_zeros(
    size: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Return zeros that cost memory on the CPU only where they are written (torch's are written at once).

    Args:
        size: no part of it 0.
        dtype: of any kind, 8-bit floats included.
        device: where.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    buffer = mmap.mmap(-1, math.prod(size) * dtype.itemsize)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(size)
