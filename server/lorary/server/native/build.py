"""Compile the CPU kernels, once for these sources, flags and CPU.

The library lies in ``$LORARY_HOME/kernels/<hash of sources, flags and CPU>.so`` (default
``~/.cache/lorary``).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from lorary.home import lorary_home

_FOLDER = Path(__file__).parent
_SOURCES = tuple(
    _FOLDER / f"{name}.cpp"
    for name in ("adapters", "attention", "layer", "matmul", "norms", "rows", "sampling", "threads")
)
_HEADERS = tuple(
    _FOLDER / f"{name}.h"
    for name in ("adapters", "attention", "common", "matmul", "matmul_int8", "share")
)
# Not -ffast-math: linked into a shared library it would switch off denormals for the whole process.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")


def build() -> Path | str:
    """Return the library, compiled if need be, or the reason why there is none."""
    if platform.system() != "Linux":
        return f"the native kernels are built on Linux only, not on {platform.system()}"
    library = _library_path()
    if library.exists():
        return library
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        return "no C++ compiler (c++, g++ or clang++) on the PATH"
    return _compile(compiler, library) or library


def _library_path() -> Path:
    digest = hashlib.sha256()
    for source in (*_SOURCES, *_HEADERS):
        digest.update(source.read_bytes())
    digest.update(" ".join(_FLAGS).encode())
    digest.update(_cpu_identity().encode())
    return lorary_home() / "kernels" / f"{digest.hexdigest()[:24]}.so"


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
