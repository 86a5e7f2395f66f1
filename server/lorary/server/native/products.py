"""Products with one side fixed: packed weights of the base, and the pool of a group's adapters."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.adapters.segments import Segments


class PackedLinear:
    """A weight in the matrix product's own layout, and its bias.

    Attributes:
        dtype: the weight's, and of what it is multiplied with.
        address: where the packed weight lies.
        scales_address, offsets_address: None, as only 8-bit weights have them.
        bias_address: where the bias lies, float32 [out]; None without one.
    """

    scales_address = None
    offsets_address = None

    def __init__(
        self,
        functions: Mapping[torch.dtype, ctypes._NamedFuncPointer],
        packed: torch.Tensor,
        out_features: int,
        in_features: int,
        bias: torch.Tensor | None,
    ) -> None:
        self._functions = functions
        self._tensors = (packed, None if bias is None else bias.float().contiguous())
        self.dtype = packed.dtype
        self.out_features = out_features
        self.in_features = in_features
        self.address = packed.data_ptr()
        self.bias_address = None if self._tensors[1] is None else self._tensors[1].data_ptr()

    def linear(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Multiply x [..., in], sums in float32 → [..., out] of ``dtype``.

        ``x`` is rounded to the weight's dtype; ``dtype`` is that (the default) or float32. A row's
        result does not depend on the other rows.
        """
        dtype = dtype or self.dtype
        rows = x.reshape(-1, self.in_features).to(self.dtype)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=dtype)
        self._functions[dtype](
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            self.address,
            self.bias_address,
            self.out_features,
            self.in_features,
            y.data_ptr(),
            self.out_features,
            torch.get_num_threads(),
        )
        return y


class Int8Linear:
    """A weight as 8-bit numbers in the product's own layout, with its scales and bias.

    Attributes:
        dtype: the packed weight's.
        address, scales_address, offsets_address: where weight, scales and offsets lie.
        bias_address: where the bias lies, float32 [out]; None without one.
    """

    dtype = torch.int8

    def __init__(
        self,
        functions: Mapping[torch.dtype, ctypes._NamedFuncPointer],
        packed: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
    ) -> None:
        self._functions = functions
        self._bias = None if bias is None else bias.float().contiguous()
        self._tensors = (packed, scales, offsets)
        self.out_features, self.in_features = shape
        self.address, self.scales_address, self.offsets_address = (
            t.data_ptr() for t in self._tensors
        )
        self.bias_address = None if self._bias is None else self._bias.data_ptr()

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in], float32 or bfloat16 → [..., out] of the same dtype.

        Rows are rounded to 8 bits with a scale for each 64 of their elements; a row's result does not depend on the
        other rows.
        """
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        self._functions[x.dtype](
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            self.address,
            self.scales_address,
            self.offsets_address,
            self.bias_address,
            self.out_features,
            self.in_features,
            y.data_ptr(),
            self.out_features,
            torch.get_num_threads(),
        )
        return y


class BoundKernel:
    """The kernel over one group's pool; holds the pool's tensors alive."""

    def __init__(
        self, function: ctypes._NamedFuncPointer, a: torch.Tensor, b: Sequence[torch.Tensor]
    ) -> None:
        self._function = function
        self._tensors = (a, *b)
        members, cap, width = a.shape
        self._b = (ctypes.c_void_p * members)(*[t.data_ptr() for t in b])
        self._outs = (ctypes.c_int64 * members)(*[t.shape[1] for t in b])
        self._fixed = (
            a.data_ptr(),
            ctypes.addressof(self._b),
            ctypes.addressof(self._outs),
            members,
            cap,
            width,
        )

    def add_rows(self, y: torch.Tensor, x: torch.Tensor, segments: Segments) -> None:
        """Add the adapters of ``segments.short_rows`` to ``y``, in place.

        Shapes: y [T, sum of outs] with unit stride in rows, x [T, in] contiguous.
        """
        self._function(
            x.data_ptr(),
            y.data_ptr(),
            *self._fixed,
            y.stride(0),
            segments.short_rows.data_ptr(),
            segments.short_entry.data_ptr(),
            segments.rank_indptr.data_ptr(),
            segments.rank_rows.data_ptr(),
            segments.rank_scales.data_ptr(),
            segments.num_short,
            torch.get_num_threads(),
        )
