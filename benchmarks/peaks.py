"""What this machine can read and multiply in a second, by torch's means and by our own kernels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorary.server.native import library as native

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_BYTES = 1 << 29
"""More than any cache holds."""
_REPEATS = 7
# Rows, inputs and outputs: a square one, and this project's smallest base reading a long prompt.
_PRODUCTS = ((1024, 1024, 1024), (512, 2048, 2048), (512, 576, 3072))


def bandwidths() -> dict[str, float]:
    """Return bytes read a second, by way; all of torch's threads read."""
    kernels = _kernels()
    matrix = torch.ones(_READ_BYTES // 4).view(-1, 2048)
    seconds = {
        "torch sum, float32": _best_s(torch.sum, matrix),
        "torch matrix-vector product, float32": _best_s(torch.mv, matrix, torch.ones(2048)),
    }
    del matrix
    if kernels.supports_layers(torch.bfloat16):
        packed = kernels.pack(torch.ones(_READ_BYTES // 4096, 2048, dtype=torch.bfloat16), None)
        row = torch.ones(1, 2048, dtype=torch.bfloat16)
        seconds["our product of one row, bfloat16"] = _best_s(packed.linear, row)
    return {way: _READ_BYTES / s for way, s in seconds.items()}


def peaks() -> tuple[dict[str, float], dict[str, float]]:
    """Return operations a second in bfloat16 and with 8-bit weights, by way and size."""
    kernels = _kernels()
    bf16: dict[str, float] = {}
    int8: dict[str, float] = {}
    for rows, width, out in _PRODUCTS:
        operations = 2 * rows * width * out
        size = f"{rows} x {width} x {out}"
        x = torch.randn(rows, width).to(torch.bfloat16)
        weight = torch.randn(out, width).to(torch.bfloat16)
        bf16[f"torch, {size}"] = operations / _best_s(nn.functional.linear, x, weight)
        if kernels.can_pack(weight):
            packed = kernels.pack(weight, None)
            bf16[f"ours, {size}"] = operations / _best_s(packed.linear, x)
        eights = [
            torch.randint(-127, 127, s, dtype=torch.int8) for s in ((rows, width), (width, out))
        ]
        int8[f"torch, {size}"] = operations / _best_s(torch._int_mm, *eights)
        if kernels.has_int8:
            rounded = kernels.pack_int8(weight, None)
            int8[f"ours, {size}"] = operations / _best_s(rounded.linear, x)
    return bf16, int8


def _kernels() -> native.NativeKernels:
    kernels = native.load()
    if isinstance(kernels, str):
        raise RuntimeError(f"there are no native kernels to measure: {kernels}")
    return kernels


def _best_s(call: Callable[..., object], *arguments: torch.Tensor) -> float:
    """Return the seconds of the fastest of several calls: a peak is what is possible."""
    call(*arguments)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - started)
    return min(times)
