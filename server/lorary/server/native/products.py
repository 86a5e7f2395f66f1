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

PANEL, GROUP = 32, 64
"""Outputs of one panel of a packed weight, and inputs that share a scale, as in the matmul headers."""


class PackedLinear:
    """A weight in the matrix product's own layout, and its bias; holds its tensors alive.

    Attributes:
        dtype: the packed weight's, and unless that is int8 of what it is multiplied with.
        bias: float32 [out]; None without one.
        address: where the packed weight lies.
        scales_address, offsets_address: where an 8-bit weight's scales and offsets lie, else None.
        bias_address: where the bias lies, float32 [out]; None without one.
    """

    def __init__(
        self,
        functions: Mapping[torch.dtype, ctypes._NamedFuncPointer],
        packed: torch.Tensor,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        scales: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> None:
        self._functions = functions
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

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of the weight as it is multiplied, float32 [stop - start, in]."""
        packed, scales = self._tensors[:2]
        assert packed is not None
        # Inputs that lie side by side for one output: in int8 the fourth may be padding.
        together = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[self.dtype]
        panels = slice(start // PANEL, -(-stop // PANEL))
        depth = -(-self.in_features // together)
        found = packed.view(-1, depth, PANEL, together)[panels].transpose(1, 2)
        weight = found.reshape(-1, depth * together)[:, : self.in_features].float()
        if scales is not None:
            of_groups = scales.view(-1, -(-self.in_features // GROUP), PANEL)[panels]
            of_rows = of_groups.transpose(1, 2).reshape(weight.shape[0], -1)
            weight *= of_rows.repeat_interleave(GROUP, dim=1)[:, : self.in_features]
        first = panels.start * PANEL
        return weight[start - first : stop - first]

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
        has_scales = self.scales_address is not None
        scaling = (self.scales_address, self.offsets_address) if has_scales else ()
        self._functions[x.dtype](
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            self.address,
            *scaling,
            self.bias_address,
            self.out_features,
            self.in_features,
            y.data_ptr(),
            self.out_features,
            torch.get_num_threads(),
        )
        return y


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
