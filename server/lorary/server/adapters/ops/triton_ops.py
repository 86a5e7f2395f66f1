"""Mixed-adapter product on a GPU, by Triton: two launches a group (kernels in ``triton_kernels``)."""

from __future__ import annotations

import functools
import subprocess
from typing import TYPE_CHECKING, Any

import torch

from lorary.server.adapters.segments import PoolEntry, Segments
from lorary.server.adapters.tiles import TILE_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.adapters.tiles import RowTiles

BLOCK_RANK = 16
BLOCK_IN = 128
BLOCK_OUT = 128
# Inputs of one stretch at least, and stretches at most: a decode step of few rows has too few
# programs to ask for all of the memory's bandwidth otherwise.
_STRETCH, _MAX_SPLIT = 1024, 8
# Blocks of rank rows that are under way at once; larger ranks go round again.
_RANK_PROGRAMS = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonKernels:
    """The compiled or interpreted kernels; ``load`` makes it."""

    def __init__(self, kernels: Any, language: Any, *, is_interpreted: bool) -> None:
        self.kernels = kernels
        self.language = language
        self.is_interpreted = is_interpreted

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether there are kernels for this dtype."""
        return dtype in _DTYPES

    def supports_storage(self, dtype: torch.dtype) -> bool:
        """Whether this GPU reads rows of this dtype; 8-bit floats since compute capability 8.9."""
        if dtype == torch.float8_e4m3fn and not self.is_interpreted:
            return torch.cuda.get_device_capability() >= (8, 9)
        return dtype in (*_DTYPES, torch.int8, torch.float8_e4m3fn)

    def bind(
        self,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        row_scales: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        bias: torch.Tensor | None = None,
    ) -> TritonPool:
        """Fix the pool of one group of layers, so that a call passes only what changes per step.

        ``dtype`` is that of the rows to be multiplied (default: the pool's), ``bias`` float32 [sum of
        outs] what the layers add: column scales leave it alone.
        """
        return TritonPool(self, a, b, row_scales, dtype or a.dtype, bias)


class TritonPool:
    """The kernels over one group's pool; holds the pool's tensors alive.

    Shapes: a [members, cap, in], b members × [cap, out_m], contiguous, one dtype, row_scales float32
    [members, cap] where that has 8 bits, bias float32 [sum of outs], on the device that the steps run
    on.
    """

    def __init__(
        self,
        ops: TritonKernels,
        a: torch.Tensor,
        b: Sequence[torch.Tensor],
        row_scales: torch.Tensor | None,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> None:
        self._shrink, self._expand = ops.kernels.shrink, ops.kernels.expand
        self._row_scales, self._dtype, self._bias = row_scales, dtype, bias
        self._a, self._b = a, tuple(b)
        self._members, self._cap, self._in_features = a.shape
        self._split = min(_MAX_SPLIT, max(1, self._in_features // _STRETCH))
        outs = [tensor.shape[1] for tensor in b]
        blocks: list[list[int]] = []
        offset = 0
        for member, out in enumerate(outs):
            blocks += [[member, out, c, offset + c] for c in range(0, out, BLOCK_OUT)]
            offset += out
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=a.device)
        addresses = [tensor.data_ptr() for tensor in b]
        self._table = torch.tensor(addresses, dtype=torch.int64, device=a.device)
        language = ops.language
        self._type = _type_of(language, a.dtype)
        self._align = 16 if all(n % 16 == 0 for n in (*outs, *addresses)) else 1
        # Three products of 11-bit parts are as good as float32 where B has no more than 11 bits.
        self._precision = "ieee" if a.dtype == torch.float32 else "tf32x3"
        # The interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same.
        self._dot = language.float32 if ops.is_interpreted else _type_of(language, dtype)

    def warm_up(self, dtype: torch.dtype | None = None) -> None:
        """Compile for outputs of ``dtype`` (default: the pool's), so that no request waits for it.

        Adds the pool's first row, times zero, to a row of zeros.
        """
        entry = PoolEntry(rows=(0,), scales=(0.0,))
        segments = Segments.build([entry], device=self._a.device, long_from=2)
        assert segments is not None
        x = self._a.new_zeros(1, self._in_features, dtype=self._dtype)
        y = x.new_zeros(1, sum(tensor.shape[1] for tensor in self._b), dtype=dtype)
        self.add_rows(y, x, segments)

    def add_rows(self, y: torch.Tensor, x: torch.Tensor, segments: Segments) -> None:
        """Add the adapters of ``segments.short_rows`` to ``y``, in place.

        Shapes: y [T, sum of outs] of any float dtype with unit stride in rows, x [T, in] contiguous, of
        the bound dtype.
        """
        # Triton launches on the current device.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            self.expand_rows(y, self.shrink_rows(x, segments.tiles), segments.tiles)

    def shrink_rows(self, x: torch.Tensor, tiles: RowTiles) -> torch.Tensor:
        """Launch the first half: return the rank rows' sums, float32 [splits, members, sums], flat."""
        sums = self._split * self._members * tiles.num_sums
        t = torch.empty(sums, dtype=torch.float32, device=x.device)
        rank_programs = min(_RANK_PROGRAMS, -(-tiles.max_rank // BLOCK_RANK))
        self._shrink[(tiles.num_tiles, self._members * self._split, rank_programs)](
            x,
            self._a,
            t,
            tiles.tiles,
            tiles.rows,
            tiles.rank_rows,
            tiles.rank_scales,
            tiles.rank_scales if self._row_scales is None else self._row_scales,
            self._in_features,
            self._cap,
            self._members,
            tiles.num_sums,
            SPLIT=self._split,
            HAS_SCALES=self._row_scales is not None,
            DOT=self._dot,
            BLOCK_ROWS=TILE_ROWS,
            BLOCK_RANK=BLOCK_RANK,
            BLOCK_IN=BLOCK_IN,
            num_warps=4,
            num_stages=3,
        )
        return t

    def expand_rows(self, y: torch.Tensor, t: torch.Tensor, tiles: RowTiles) -> None:
        """Launch the second half: add what the sums ``t`` of ``shrink_rows`` make of B to ``y``, in place."""
        self._expand[(tiles.num_tiles, self._blocks.shape[0])](
            y,
            t,
            self._table,
            self._blocks,
            t if self._bias is None else self._bias,
            tiles.tiles,
            tiles.rows,
            tiles.rank_rows,
            y.stride(0),
            self._members,
            tiles.num_sums,
            SPLIT=self._split,
            HAS_BIAS=self._bias is not None,
            B=self._type,
            ALIGN=self._align,
            PRECISION=self._precision,
            BLOCK_ROWS=TILE_ROWS,
            BLOCK_RANK=BLOCK_RANK,
            BLOCK_OUT=BLOCK_OUT,
            num_warps=4,
            num_stages=2,
        )


def _type_of(language: Any, dtype: torch.dtype) -> Any:
    name = {torch.float8_e4m3fn: "float8e4nv"}.get(dtype, str(dtype).removeprefix("torch."))
    return getattr(language, name)


@functools.cache
def load() -> TritonKernels | str:
    """Return the kernels, tried out once, or the reason why there are none.

    Where ``TRITON_INTERPRET=1`` was set before Triton was first imported they run in its interpreter,
    on any device and very slowly: for tests.
    """
    try:
        import triton

        from lorary.server.adapters.ops import triton_kernels
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    is_interpreted = not isinstance(triton_kernels.shrink, triton.JITFunction)
    if not is_interpreted and not torch.cuda.is_available():
        return "Triton compiles for GPUs, and there is none"
    kernels = TritonKernels(triton_kernels, triton.language, is_interpreted=is_interpreted)
    try:
        kernels.bind(*_probe_pool(is_interpreted)).warm_up()
    except (triton.TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        # A machine without a C compiler or Python's headers, or a GPU too old for this Triton.
        return f"Triton cannot compile here: {error}"
    return kernels


def _probe_pool(is_interpreted: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    device = "cpu" if is_interpreted else "cuda"
    return torch.zeros(1, 16, 16, device=device), [torch.zeros(16, 16, device=device)]
