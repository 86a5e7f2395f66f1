"""The CPU kernels, called through ctypes.

Where they cannot be built ``load`` returns the reason instead, and the caller says so once and uses
torch operators: slower, same results.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorary.server.native.build import build
from lorary.server.native.products import STORAGE, BoundKernel, PackedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ABI = 16
# Outputs of one panel of a packed weight, and inputs that share a scale, as in the matmul headers.
_PANEL, _GROUP = 32, 64
# Elements whose float32 form lies in the caches while they are rounded.
_ROUNDED_AT_ONCE = 1 << 20
_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_POOL = [*[_POINTER] * 3, *[_INT64] * 4, _POINTER, _INT64, _POINTER]
_ADD_ROWS = [*[_POINTER] * 2, *_POOL, *[_POINTER] * 6, _INT64, ctypes.c_int]
_ROWS = [_POINTER, _INT64, _INT64]
_OUTPUT = [_INT64, _INT64, _POINTER, _INT64, ctypes.c_int]
_LINEAR = [*_ROWS, *[_POINTER] * 2, *_OUTPUT]
_LARGEST = [*_ROWS, *[_POINTER] * 2, _INT64, _INT64, _POINTER, ctypes.c_int]
_LINEAR_INT8 = [*_ROWS, *[_POINTER] * 4, *_OUTPUT]
_PACK_INT8 = [_POINTER, _INT64, _INT64, _POINTER, ctypes.c_int]
_PACK = [_POINTER, *[_INT64] * 3, _POINTER, ctypes.c_int]
_NORMS = [*[_POINTER] * 2, *[_INT64] * 3, *[_POINTER] * 2, _INT64, _POINTER, ctypes.c_int]
_LAYERS = [_POINTER, _POINTER]
_SQUARES = [_POINTER, _INT64, *[_POINTER] * 4]
_LAY = [_POINTER, _INT64, _POINTER, _INT64]
_ARGMAX = [_POINTER, *[_INT64] * 3, _POINTER, ctypes.c_int]
_DRAW = [_POINTER, _INT64, _INT64, _POINTER, _INT64, _POINTER, ctypes.c_int]
_DECODE = [
    *[_POINTER] * 5,
    _INT64,
    *[_POINTER] * 2,
    *[_INT64] * 6,
    _FLOAT,
    _FLOAT,
    _INT64,
    ctypes.c_int,
]


class Draw(ctypes.Structure):
    """How one row of logits is drawn from; ``uniform`` lies in [0, 1)."""

    _fields_ = (
        ("row", _INT64),
        ("top_k", _INT64),
        ("uniform", ctypes.c_double),
        ("temperature", _FLOAT),
        ("top_p", _FLOAT),
        ("min_p", _FLOAT),
    )


class Part(ctypes.Structure):
    """One module's matrices, and where their rows go; semantics in rows.cpp."""

    _fields_ = (
        ("a", _POINTER),
        ("b", _POINTER),
        ("is_half", _INT64),
        ("rank", _INT64),
        ("in_features", _INT64),
        ("out_features", _INT64),
        ("to_a", _POINTER),
        ("to_b", _POINTER),
    )


class Spans:
    """Where tensors of bfloat16 or float32 lie in a file's bytes.

    Args:
        starts: the byte at which each begins.
        counts: how many elements each has.
        is_bfloat16: whether it is of bfloat16, or else of float32.
    """

    def __init__(
        self, starts: Sequence[int], counts: Sequence[int], is_bfloat16: Sequence[bool]
    ) -> None:
        many = ctypes.c_int64 * len(starts)
        self.starts, self.counts = many(*starts), many(*counts)
        self.is_bfloat16 = many(*is_bfloat16)


class NativeKernels:
    """The compiled library.

    Calls are safe from any thread; each spreads its rows over torch's number of threads, through the
    OpenMP runtime that torch has already loaded (two runtimes would spin against each other).
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        if library.lorary_abi() != _ABI:
            raise OSError(f"kernel library {path} has another ABI; delete it")
        self.path = path
        self._pin_team = library.lorary_pin_team
        self._add_rows = {
            dtype: typed(library, f"lorary_add_rows_{suffix}", _ADD_ROWS)
            for dtype, suffix in _SUFFIX.items()
        }
        self._decode = {
            dtype: typed(library, f"lorary_decode_{suffix}", _DECODE)
            for dtype, suffix in _SUFFIX.items()
        }
        has_bf16 = bool(library.lorary_has_bf16())
        self._packed = [torch.float32, *([torch.bfloat16] if has_bf16 else [])]
        self._pack = {
            dtype: typed(library, f"lorary_pack_{_SUFFIX[dtype]}", _PACK) for dtype in self._packed
        }
        self._layers = {
            dtype: typed(library, f"lorary_layers_{_SUFFIX[dtype]}", _LAYERS)
            for dtype in self._packed
        }
        # By the weight's dtype, then by the rows'.
        f32 = torch.float32
        self._linear = {f32: {f32: typed(library, "lorary_linear_f32", _LINEAR)}}
        if has_bf16:
            self._linear[torch.bfloat16] = {
                torch.bfloat16: typed(library, "lorary_linear_bf16", _LINEAR),
                f32: typed(library, "lorary_linear_f32_bf16", _LINEAR),
            }
        self._largest = {
            dtype: typed(library, f"lorary_largest_{_SUFFIX[dtype]}", _LARGEST)
            for dtype in self._packed
        }
        self._norms = {
            dtype: typed(library, f"lorary_norms_{suffix}", _NORMS)
            for dtype, suffix in {**_SUFFIX, torch.int8: "int8"}.items()
        }
        self._squares = typed(library, "lorary_squares", _SQUARES)
        self._lay = {
            dtype: typed(library, f"lorary_lay_{suffix}", _LAY) for dtype, suffix in _SUFFIX.items()
        }
        library.lorary_part_bytes.restype = _INT64
        assert library.lorary_part_bytes() == ctypes.sizeof(Part)
        self._draw = typed(library, "lorary_draw_f32", _DRAW)
        library.lorary_draw_bytes.restype = _INT64
        assert library.lorary_draw_bytes() == ctypes.sizeof(Draw)
        self._argmax = typed(library, "lorary_argmax_f32", _ARGMAX)
        self.has_int8 = bool(library.lorary_has_int8())
        """Whether this CPU has the product with 8-bit weights."""
        self._linear_int8 = {}
        if self.has_int8:
            self._pack_int8 = typed(library, "lorary_pack_int8", _PACK_INT8)
            self._linear_int8 = {
                dtype: typed(library, f"lorary_linear_int8_{suffix}", _LINEAR_INT8)
                for dtype, suffix in _SUFFIX.items()
            }
        sizes = [getattr(library, f"lorary_{name}_bytes") for name in ("layer", "model", "step")]
        for size in sizes:
            size.restype = _INT64
        self.structure_bytes = tuple(size() for size in sizes)
        """Sizes of the layer's, the model's and the step's structure."""

    def pin_team(self, cpus: Sequence[int]) -> int:
        """Pin the calling thread and its OpenMP workers, one to each of ``cpus``.

        Returns:
            How many threads were pinned; fewer than asked when the system does not allow it.
        """
        numbers = (ctypes.c_int32 * len(cpus))(*cpus)
        return int(self._pin_team(numbers, len(cpus)))

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels for this dtype."""
        return dtype in _SUFFIX

    def supports_storage(self, dtype: torch.dtype) -> bool:
        """Whether the kernels read adapters that are kept in this dtype."""
        return dtype in STORAGE

    def bind(
        self,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        row_scales: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        bias: torch.Tensor | None = None,
    ) -> BoundKernel:
        """Fix the pool of one group of layers, so that a call passes only what changes per step.

        ``dtype`` is that of the rows to be multiplied (default: the pool's), ``bias`` float32 [sum of
        outs] what the layers add: column scales leave it alone.
        """
        return BoundKernel(self._add_rows[dtype or a.dtype], a, b, row_scales, bias)

    def supports_layers(self, dtype: torch.dtype) -> bool:
        """Whether packed products and whole layers run in this dtype on this CPU."""
        return dtype in self._packed

    def layers_function(self, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
        """Return the function of layer.cpp for this dtype."""
        return self._layers[dtype]

    def can_pack(self, weight: torch.Tensor) -> bool:
        """Whether ``pack`` takes this weight [out, in]."""
        is_matrix = weight.dim() == 2 and weight.stride(1) == 1 and weight.shape[1] % 2 == 0
        return is_matrix and weight.device.type == "cpu" and weight.dtype in self._packed

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """Copy a weight [out, in] that ``can_pack`` into the kernel's layout."""
        out, width = weight.shape
        packed = torch.empty(-(-out // _PANEL) * _PANEL * width, dtype=weight.dtype)
        self._pack[weight.dtype](
            weight.data_ptr(),
            weight.stride(0),
            out,
            width,
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        return PackedLinear(
            self._linear[weight.dtype],
            self._norms[weight.dtype],
            packed,
            (out, width),
            bias,
            largest=self._largest[weight.dtype],
        )

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """Round a weight [out, in] of any float dtype to 8 bits, a scale for each 64 inputs.

        Only where ``has_int8``.
        """
        out, width = weight.shape
        panels, groups = -(-out // _PANEL), -(-width // _GROUP)
        matrix = torch.empty(out, width, dtype=torch.int8)
        scales = torch.zeros(panels * _PANEL, groups)
        offsets = torch.zeros(panels * _PANEL, groups, dtype=torch.int32)
        # Some rows at a time: in float32 a whole layer would be a peak of memory, and out of the caches.
        step = max(1, _ROUNDED_AT_ONCE // width)
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            values = nn.functional.pad(weight[rows].float(), (0, groups * _GROUP - width))
            values = values.view(-1, groups, _GROUP)
            torch.div(values.abs().amax(dim=2), 127.0, out=scales[rows])
            values = values.div_(scales[rows].clamp_min(1e-30)[:, :, None]).round_().to(torch.int8)
            offsets[rows] = values.sum(dim=2, dtype=torch.int32) * 128
            matrix[rows] = values.view(-1, groups * _GROUP)[:, :width]
        packed = torch.empty(panels * _PANEL * -(-width // 4) * 4, dtype=torch.int8)
        self._pack_int8(matrix.data_ptr(), out, width, packed.data_ptr(), torch.get_num_threads())

        def by_panel(m: torch.Tensor) -> torch.Tensor:
            return m.view(panels, _PANEL, groups).transpose(1, 2).contiguous()

        return PackedLinear(
            self._linear_int8,
            self._norms[torch.int8],
            packed,
            (out, width),
            bias,
            by_panel(scales),
            by_panel(offsets),
        )

    def squares(self, data: torch.Tensor, spans: Spans) -> list[float]:
        """Return the sum of squares of tensors that lie in a file's bytes, uint8 [n].

        Returns:
            The sums; NaN or infinite where an element is, or where a square is beyond float32.
        """
        count = len(spans.starts)
        sums = (ctypes.c_double * count)()
        self._squares(data.data_ptr(), count, spans.starts, spans.counts, spans.is_bfloat16, sums)
        return list(sums)

    def lay(self, parts: ctypes.Array[Part], rows: Sequence[int], dtype: torch.dtype) -> None:
        """Write adapters' matrices into rows of a pool of this dtype (semantics in rows.cpp)."""
        self._lay[dtype](parts, len(parts), (ctypes.c_int64 * len(rows))(*rows), len(rows))

    def argmax(self, logits: torch.Tensor) -> list[int]:
        """Return where each row of logits float32 [n, vocab], unit stride in rows, is largest first."""
        rows, width = logits.shape
        found = (ctypes.c_int64 * rows)()
        self._argmax(
            logits.data_ptr(), logits.stride(0), rows, width, found, torch.get_num_threads()
        )
        return list(found)

    def draw(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        """Return one token for each of ``draws``; logits float32 [n, vocab], unit stride in rows."""
        drawn = (ctypes.c_int64 * len(draws))()
        self._draw(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            (Draw * len(draws))(*draws),
            len(draws),
            drawn,
            torch.get_num_threads(),
        )
        return list(drawn)

    def decode_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Attend one token per row over its blocks (semantics in attention.h).

        Shapes: q [n, H, D] with unit stride in D, k and v [blocks, Hkv, 32, D] contiguous, tables int32
        [slots, W] of blocks, slots and lengths int32 [n] → [n, H, D] of q's dtype.
        """
        rows, heads, dim = q.shape
        kv_heads = k.shape[1]
        out = torch.empty(rows, heads, dim, dtype=q.dtype)
        self._decode[q.dtype](
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            tables.data_ptr(),
            tables.shape[1],
            slots.data_ptr(),
            lengths.data_ptr(),
            rows,
            kv_heads,
            heads // kv_heads,
            dim,
            q.stride(0),
            q.stride(1),
            scale,
            softcap or 0.0,
            window or 0,
            torch.get_num_threads(),
        )
        return out


def typed(library: ctypes.CDLL, name: str, arguments: Sequence[type]) -> ctypes._NamedFuncPointer:
    """Return a function of the library that takes these arguments and returns nothing."""
    function = getattr(library, name)
    function.restype = None
    function.argtypes = list(arguments)
    return function  # type: ignore[no-any-return]


@functools.cache
def load() -> NativeKernels | str:
    """Return the kernels, compiling them if need be, or the reason why there is none."""
    library = build()
    if isinstance(library, str):
        return library
    try:
        return NativeKernels(library)
    except (OSError, AttributeError) as error:
        return f"cannot load {library}: {error}"
