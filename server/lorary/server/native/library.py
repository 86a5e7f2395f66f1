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
    from collections.abc import Sequence

    from lorary.server.adapters.segments import Segments

_ABI = 3
_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "adapters.cpp", _FOLDER / "attention.cpp", _FOLDER / "threads.cpp")
_HEADERS = (_FOLDER / "common.h",)
# Not -ffast-math: linked into a shared library it would switch off denormals for the whole process.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")
_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_ADD_ROWS = [*[_POINTER] * 5, *[_INT64] * 4, *[_POINTER] * 5, _INT64, ctypes.c_int]
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
            dtype: _typed(library, f"lorary_add_rows_{suffix}", _ADD_ROWS)
            for dtype, suffix in _SUFFIX.items()
        }
        self._decode = {
            dtype: _typed(library, f"lorary_decode_{suffix}", _DECODE)
            for dtype, suffix in _SUFFIX.items()
        }

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


def _typed(library: ctypes.CDLL, name: str, arguments: Sequence[type]) -> ctypes._NamedFuncPointer:
    function = getattr(library, name)
    function.restype = None
    function.argtypes = list(arguments)
    return function  # type: ignore[no-any-return]


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
