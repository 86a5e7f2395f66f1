"""One copy from the host to the device for everything that a step, or a draw, has to tell it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALIGN = 16
"""Bytes: what a kernel may rely on of an array's address."""


def upload(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return the tensors, which are on the host, on ``device``.

    On a GPU they travel side by side in one piece of pinned memory, and nobody waits for that; what is
    returned are views of one tensor there. On the CPU they are returned as they are.
    """
    if is_beside(device):
        return list(parts)
    packed = pack(parts, pin=True).to(device, non_blocking=True)
    return unpack(packed, parts)


def is_beside(device: torch.device) -> bool:
    """Whether a device reads the host's memory, so that nothing has to travel."""
    return device.type == "cpu"


def pack(parts: Sequence[torch.Tensor], *, pin: bool) -> torch.Tensor:
    """Lay tensors side by side, each at a multiple of 16 bytes, in uint8."""
    offsets, size = _places(parts)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for part, offset in zip(parts, offsets, strict=True):
        view = packed[offset : offset + part.nbytes].view(part.dtype)
        view.copy_(part.reshape(-1))
    return packed


def unpack(packed: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of ``packed``, wherever it is, of the dtypes and shapes of ``parts``."""
    offsets, _ = _places(parts)
    return [
        packed[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
        for part, offset in zip(parts, offsets, strict=True)
    ]


def _places(parts: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Return where each tensor begins, and the size of all."""
    offsets, size = [], 0
    for part in parts:
        offsets.append(size)
        size += -(-part.nbytes // _ALIGN) * _ALIGN
    return offsets, size
