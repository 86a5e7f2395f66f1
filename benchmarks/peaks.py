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
# Rows, inputs and outputs: a square one, and this project's smallest base reading a long prompt.
_PRODUCTS = ((1024, 1024, 1024), (512, 2048, 2048), (512, 576, 3072))


class Peaks:
    """The most of each kind that was seen since ``forget``: a peak is what is possible.

    To be looked at now and then while something else is timed: other tenants of a processor take from it by the minute.
    """

    def __init__(self) -> None:
        """Allocate what is read and multiplied, a gigabyte.

        Raises:
            RuntimeError: this machine has no native kernels.
        """
        kernels = native.load()
        if isinstance(kernels, str):
            raise RuntimeError(f"there are no native kernels to measure: {kernels}")
        # By kind and way: bytes or operations of one call, and the call.
        self._ways: dict[tuple[str, str], tuple[int, Callable[[], object]]] = {}
        self._add_reads(kernels)
        for rows, width, out in _PRODUCTS:
            self._add_products(kernels, rows, width, out)
        self._best: dict[tuple[str, str], float] = {}
        # The first call of each allocates and, in torch, chooses.
        self.look()
        self.forget()

    def _add_reads(self, kernels: native.NativeKernels) -> None:
        matrix = torch.ones(_READ_BYTES // 4).view(-1, 2048)
        vector = torch.ones(2048)
        reads: dict[str, Callable[[], object]] = {
            "torch sum, float32": lambda: torch.sum(matrix),
            "torch matrix-vector product, float32": lambda: torch.mv(matrix, vector),
        }
        if kernels.supports_layers(torch.bfloat16):
            packed = kernels.pack(torch.ones(_READ_BYTES // 4096, 2048, dtype=torch.bfloat16), None)
            row = torch.ones(1, 2048, dtype=torch.bfloat16)
            reads["our product of one row, bfloat16"] = lambda: packed.linear(row)
        for way, call in reads.items():
            self._ways["bandwidth", way] = (_READ_BYTES, call)

    def _add_products(self, kernels: native.NativeKernels, rows: int, width: int, out: int) -> None:
        operations = 2 * rows * width * out
        size = f"{rows} x {width} x {out}"
        x = torch.randn(rows, width).to(torch.bfloat16)
        weight = torch.randn(out, width).to(torch.bfloat16)

        def add(kind: str, whose: str, call: Callable[[], object]) -> None:
            self._ways[kind, f"{whose}, {size}"] = (operations, call)

        add("bf16_peak", "torch", lambda: nn.functional.linear(x, weight))
        if kernels.can_pack(weight):
            packed = kernels.pack(weight, None)
            add("bf16_peak", "ours", lambda: packed.linear(x))
        left = torch.randint(-127, 127, (rows, width), dtype=torch.int8)
        right = torch.randint(-127, 127, (width, out), dtype=torch.int8)
        add("int8_peak", "torch", lambda: torch._int_mm(left, right))
        if kernels.has_int8:
            rounded = kernels.pack_int8(weight, None)
            add("int8_peak", "ours", lambda: rounded.linear(x))

    def forget(self) -> None:
        """Begin anew."""
        self._best.clear()

    def look(self) -> None:
        """Measure every way once; about 0.2 s on two cores."""
        for way, (amount, call) in self._ways.items():
            started = time.perf_counter()
            call()
            per_second = amount / (time.perf_counter() - started)
            self._best[way] = max(per_second, self._best.get(way, 0.0))

    def best(self) -> dict[str, dict[str, float]]:
        """Return bytes (``bandwidth``) and operations (``bf16_peak``, ``int8_peak``) a second, by way."""
        found: dict[str, dict[str, float]] = {}
        for (kind, way), per_second in self._best.items():
            found.setdefault(kind, {})[way] = per_second
        return found
