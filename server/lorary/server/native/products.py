"""Products with one side fixed: packed weights of the base, and the pool of a group's adapters."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.adapters.segments import Segments

STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""What a pool may keep its rows in, by the numbers of adapters.h."""


class PackedLinear:
    """A weight in the matrix product's own layout, and its bias; holds its tensors alive.

    Attributes:
        dtype: the packed weight's, and unless that is int8 of what it is multiplied with.
        bias: float32 [out]; None without one.
        address: where the packed weight lies.
        scales_address, offsets_address: where an 8-bit weight's scales and offsets lie, else None.
        bias_address: where the bias lies, float32 [out]; None without one.
        largest: the kernel that finds each float32 row's largest output and keeps none; None for 8 bits.
    """

    def __init__(
        self,
        functions: Mapping[torch.dtype, ctypes._NamedFuncPointer],
        norms: ctypes._NamedFuncPointer,
        packed: torch.Tensor,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        scales: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        *,
        largest: ctypes._NamedFuncPointer | None = None,
    ) -> None:
        self.largest = largest
        self._functions = functions
        self._norms = norms
        self._tensors = (
            packed,
            scales,
            offsets,
            # Detached, because a layer that gives up its parameters changes what they point to.
            None if bias is None else bias.detach().float().contiguous(),
        )
        self.dtype = packed.dtype
        self.bias = self._tensors[3]
        self.out_features, self.in_features = shape
        self.address, self.scales_address, self.offsets_address, self.bias_address = (
            None if t is None else t.data_ptr() for t in self._tensors
        )

    @property
    def num_bytes(self) -> int:
        """What weight, scales, offsets and bias take."""
        return sum(0 if t is None else t.nbytes for t in self._tensors)

    def norms(self, start: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the lengths of the weight's rows from ``start`` on, each with its row of b @ a.

        Shapes: a [r, in], b [n, r] → float32 [n].
        """
        a, b = a.float().contiguous(), b.float().contiguous()
        found = torch.empty(b.shape[0])
        self._norms(
            self.address,
            self.scales_address,
            self.in_features,
            start,
            b.shape[0],
            a.data_ptr(),
            b.data_ptr(),
            a.shape[0],
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in] → [..., out] of x's dtype, with sums in float32.

        float32 rows meet bfloat16 weights with what rounding leaves of their largest elements
        (matmul.h); with 8-bit weights rows are rounded to 8 bits, a scale for each 64 elements. A row's
        result does not depend on the other rows.
        """
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        self.function(x.dtype)(*self.arguments(rows, y))
        return y

    def function(self, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
        """Return the kernel for rows of this dtype."""
        return self._functions[dtype]

    def arguments(self, x: torch.Tensor, y: torch.Tensor) -> tuple[object, ...]:
        """Return what lets the kernel of x's dtype write the product into y, as long as both live.

        Shapes: x [n, in] with unit stride in rows, y [..., out] contiguous, n rows in all.
        """
        return self._arguments(x, y.data_ptr(), self.out_features)

    def largest_arguments(
        self, x: torch.Tensor, found: ctypes.Array[ctypes.c_int64]
    ) -> tuple[object, ...]:
        """Return what lets ``largest`` write the first largest output of each row into found [n].

        Shapes: x float32 [n, in] with unit stride in rows.
        """
        return self._arguments(x, found)

    def _arguments(self, x: torch.Tensor, *into: object) -> tuple[object, ...]:
        """Return a kernel's arguments: rows, this weight, and ``into``, where the result goes."""
        has_scales = self.scales_address is not None
        return (
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            self.address,
            *((self.scales_address, self.offsets_address) if has_scales else ()),
            self.bias_address,
            self.out_features,
            self.in_features,
            *into,
            torch.get_num_threads(),
        )


class BoundKernel:
    """The kernel over one group's pool; holds the pool's tensors alive.

    Attributes:
        a_address: where A lies, [members, cap, in].
        b_address, outs_address: where the members' addresses of B and their widths lie.
        members, cap: layers of the group, rank rows of the pool.
        scales_address: where the scales of rows kept in 8 bits lie, [members, cap]; else None.
        storage: what the rows are kept in, as a number of ``STORAGE``.
    """

    def __init__(
        self,
        function: ctypes._NamedFuncPointer,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        row_scales: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self._function = function
        self._tensors = (a, *b, row_scales, bias)
        self.storage = STORAGE[a.dtype]
        self.scales_address = None if row_scales is None else row_scales.data_ptr()
        self._bias_address = None if bias is None else bias.data_ptr()
        self.members, self.cap, self._width = a.shape
        self._b = (ctypes.c_void_p * self.members)(*[t.data_ptr() for t in b])
        self._outs = (ctypes.c_int64 * self.members)(*[t.shape[1] for t in b])
        self.a_address = a.data_ptr()
        self.b_address = ctypes.addressof(self._b)
        self.outs_address = ctypes.addressof(self._outs)

    def add_rows(self, y: torch.Tensor, x: torch.Tensor, segments: Segments) -> None:
        """Add the adapters of ``segments.short_rows`` to ``y``, in place.

        Shapes: y [T, sum of outs] with unit stride in rows, x [T, in] contiguous.
        """
        self._function(
            x.data_ptr(),
            y.data_ptr(),
            self.a_address,
            self.b_address,
            self.outs_address,
            self.members,
            self.cap,
            self._width,
            y.stride(0),
            self.scales_address,
            self.storage,
            self._bias_address,
            *segments.addresses,
            torch.get_num_threads(),
        )
