"""The CPU kernels: compiled once by the system's C++ compiler, called through ctypes.

The library lies in ``$LORARY_HOME/kernels/<hash of sources, flags and CPU>.so`` (default
``~/.cache/lorary``). Without a compiler ``load`` returns the reason instead, and the caller says so
once and uses torch operators: slower, same results.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.adapters.segments import Segments

_ABI = 5
_FOLDER = Path(__file__).parent
_SOURCES = tuple(
    _FOLDER / f"{name}.cpp" for name in ("adapters", "attention", "layer", "matmul", "threads")
)
_HEADERS = tuple(
    _FOLDER / f"{name}.h" for name in ("adapters", "attention", "common", "matmul", "matmul_int8")
)
# Not -ffast-math: linked into a shared library it would switch off denormals for the whole process.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")
# Outputs of one panel of a packed weight, as in matmul.cpp.
_PANEL = 32
_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_ADD_ROWS = [*[_POINTER] * 5, *[_INT64] * 4, *[_POINTER] * 5, _INT64, ctypes.c_int]
_LINEAR = [
    _POINTER,
    _INT64,
    _INT64,
    _POINTER,
    _POINTER,
    *[_INT64] * 2,
    _POINTER,
    _INT64,
    ctypes.c_int,
]
_LINEAR_INT8 = [
    *[_POINTER, _INT64, _INT64, *[_POINTER] * 4],
    *[_INT64, _INT64, _POINTER, _INT64, ctypes.c_int],
]
_PACK_INT8 = [_POINTER, _INT64, _INT64, _POINTER, ctypes.c_int]
_PACK = [_POINTER, *[_INT64] * 3, _POINTER, ctypes.c_int]
_DECODE = [*[_POINTER] * 6, *[_INT64] * 7, _FLOAT, _FLOAT, _INT64, ctypes.c_int]


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
        self._layer = {
            dtype: typed(library, f"lorary_layer_{_SUFFIX[dtype]}", [_POINTER] * 5)
            for dtype in self._packed
        }
        self._linear = {
            (torch.float32, torch.float32): typed(library, "lorary_linear_f32", _LINEAR)
        }
        if has_bf16:
            for out, name in ((torch.bfloat16, "bf16"), (torch.float32, "bf16_f32")):
                key = (torch.bfloat16, out)
                self._linear[key] = typed(library, f"lorary_linear_{name}", _LINEAR)
        self.has_int8 = bool(library.lorary_has_int8())
        """Whether this CPU has the product with 8-bit weights."""
        self._linear_int8 = {}
        if self.has_int8:
            self._pack_int8 = typed(library, "lorary_pack_int8", _PACK_INT8)
            self._linear_int8 = {
                dtype: typed(library, f"lorary_linear_int8_{suffix}", _LINEAR_INT8)
                for dtype, suffix in _SUFFIX.items()
            }
        for name in ("layer", "step"):
            getattr(library, f"lorary_{name}_bytes").restype = _INT64
        self.structure_bytes = (library.lorary_layer_bytes(), library.lorary_step_bytes())
        """Sizes of the layer's and the step's structure."""

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

    def bind(self, a: torch.Tensor, b: Sequence[torch.Tensor]) -> BoundKernel:
        """Fix the pool of one group of layers, so that a call passes only what changes per step."""
        return BoundKernel(self._add_rows[a.dtype], a, b)

    def supports_layers(self, dtype: torch.dtype) -> bool:
        """Whether packed products and whole layers run in this dtype on this CPU."""
        return dtype in self._packed

    def layer_function(self, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
        """Return the function of layer.cpp for this dtype."""
        return self._layer[dtype]

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
        functions = {out: f for (x, out), f in self._linear.items() if x == weight.dtype}
        return PackedLinear(functions, packed, out, width, bias)

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
        """Round a weight [out, in] of any float dtype to 8 bits, one scale per output.

        Only where ``has_int8``.
        """
        out, width = weight.shape
        values = weight.float()
        scales = values.abs().amax(dim=1).div_(127.0)
        rounded = torch.round(values / scales.clamp_min(1e-30)[:, None]).to(torch.int8)
        packed = torch.empty(-(-out // _PANEL) * _PANEL * -(-width // 4) * 4, dtype=torch.int8)
        self._pack_int8(
            rounded.contiguous().data_ptr(), out, width, packed.data_ptr(), torch.get_num_threads()
        )
        offsets = rounded.sum(dim=1, dtype=torch.int32) * 128
        return Int8Linear(self._linear_int8, packed, scales, offsets, width, bias)

    def decode_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Attend one token per row over its slot (semantics in attention.cpp).

        Shapes: q [n, H, D] with unit stride in D, k and v [slots, Hkv, context, D] contiguous, slots
        and lengths int32 [n] → [n, H, D] of q's dtype.
        """
        rows, heads, dim = q.shape
        kv_heads, context = k.shape[1], k.shape[2]
        out = torch.empty(rows, heads, dim, dtype=q.dtype)
        self._decode[q.dtype](
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            slots.data_ptr(),
            lengths.data_ptr(),
            rows,
            kv_heads,
            heads // kv_heads,
            dim,
            context,
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
        in_features: int,
        bias: torch.Tensor | None,
    ) -> None:
        self._functions = functions
        self._bias = None if bias is None else bias.float().contiguous()
        self._tensors = (packed, scales, offsets)
        self.out_features = scales.numel()
        self.in_features = in_features
        self.address, self.scales_address, self.offsets_address = (
            t.data_ptr() for t in self._tensors
        )
        self.bias_address = None if self._bias is None else self._bias.data_ptr()

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in], float32 or bfloat16 → [..., out] of the same dtype.

        Rows are rounded to 8 bits with a scale of their own; a row's result does not depend on the
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


@functools.cache
def load() -> NativeKernels | str:
    """Return the kernels, compiling them if need be, or the reason why there is none."""
    if platform.system() != "Linux":
        return f"the native kernels are built on Linux only, not on {platform.system()}"
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    library = _library_path()
    if not library.exists():
        if compiler is None:
            return "no C++ compiler (c++, g++ or clang++) on the PATH"
        error = _compile(compiler, library)
        if error:
            return error
    try:
        return NativeKernels(library)
    except (OSError, AttributeError) as error:
        return f"cannot load {library}: {error}"


def _library_path() -> Path:
    home = Path(os.environ.get("LORARY_HOME") or Path.home() / ".cache" / "lorary")
    digest = hashlib.sha256()
    for source in (*_SOURCES, *_HEADERS):
        digest.update(source.read_bytes())
    digest.update(" ".join(_FLAGS).encode())
    digest.update(_cpu_identity().encode())
    return home / "kernels" / f"{digest.hexdigest()[:24]}.so"


def _cpu_identity() -> str:
    # -march=native code must not outlive its CPU on a shared home folder.
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return platform.machine() + line
    return platform.machine()


def _compile(compiler: str, library: Path) -> str:
    """Compile to a temporary file and rename it into place; return the error, or ``""``."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    except OSError as error:
        return f"cannot write {library.parent}: {error}"
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *_FLAGS, *map(str, _SOURCES), "-o", temporary],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode != 0:
            return f"{compiler} failed: {done.stderr.strip()[-400:]}"
        Path(temporary).replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} could not run: {error}"
    finally:
        Path(temporary).unlink(missing_ok=True)
    return ""
