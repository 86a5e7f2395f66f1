"""The CPU's row-wise kernel: compiled once by the system's C++ compiler, called through ctypes.

The library lies in ``$LORARY_HOME/kernels/<hash of source, flags and CPU>.so`` (default
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

_ABI = 1
_SOURCE = Path(__file__).with_name("native.cpp")
# Not -ffast-math: linked into a shared library it would switch off denormals for the whole process.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")


class NativeKernel:
    """The compiled library.

    Calls are safe from any thread; each spreads its rows over torch's number of threads, through the
    OpenMP runtime that torch has already loaded (two runtimes would spin against each other).
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        if library.lorary_abi() != _ABI:
            raise OSError(f"kernel library {path} has another ABI; delete it")
        self.path = path
        self._functions = {
            torch.bfloat16: library.lorary_add_rows_bf16,
            torch.float32: library.lorary_add_rows_f32,
        }
        for function in self._functions.values():
            function.restype = None
            function.argtypes = (
                [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 5
            ) + [ctypes.c_int64, ctypes.c_int]

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for this dtype."""
        return dtype in self._functions

    def bind(self, a: torch.Tensor, b: Sequence[torch.Tensor]) -> BoundKernel:
        """Fix the pool of one group of layers, so that a call passes only what changes per step."""
        return BoundKernel(self._functions[a.dtype], a, b)


class BoundKernel:
    """The kernel over one group's pool; holds the pool's tensors alive."""

    def __init__(self, function: object, a: torch.Tensor, b: Sequence[torch.Tensor]) -> None:
        self._function: ctypes._NamedFuncPointer = function  # type: ignore[assignment]
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
def load() -> NativeKernel | str:
    """Return the kernel, compiling it if need be, or the reason why there is none."""
    if platform.system() != "Linux":
        return f"the native kernel is built on Linux only, not on {platform.system()}"
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    library = _library_path()
    if not library.exists():
        if compiler is None:
            return "no C++ compiler (c++, g++ or clang++) on the PATH"
        error = _compile(compiler, library)
        if error:
            return error
    try:
        return NativeKernel(library)
    except (OSError, AttributeError) as error:
        return f"cannot load {library}: {error}"


def _library_path() -> Path:
    home = Path(os.environ.get("LORARY_HOME") or Path.home() / ".cache" / "lorary")
    digest = hashlib.sha256(_SOURCE.read_bytes())
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
            [compiler, *_FLAGS, str(_SOURCE), "-o", temporary],
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
