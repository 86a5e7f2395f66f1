"""vLLM for CPUs, with the allocator it is fast with."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.peers import steps
from benchmarks.peers.catalog import VLLM

_TCMALLOC = "libtcmalloc_minimal.so.4"
_TCMALLOC_PACKAGE = "libtcmalloc-minimal4"
# vLLM asks for them and runs without; their CUDA builds break its import on a machine without CUDA.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def install() -> None:
    """Install it, and see that it can be imported."""
    log = VLLM.folder / "install.log"
    if find_tcmalloc() is None:
        steps.apt_install(_TCMALLOC_PACKAGE, log=log)
        if find_tcmalloc() is None:
            raise steps.InstallError(
                f"'{_TCMALLOC_PACKAGE}' is installed, but the loader knows no {_TCMALLOC}. Run: ldconfig"
            )
    python = steps.make_environment(VLLM.folder / "env", log=log)
    steps.pip_install(python, VLLM.recipe, log=log)
    steps.pip_uninstall(python, _UNWANTED, log=log)
    steps.run(
        "importing vllm",
        [python, "-c", "from vllm.platforms import current_platform as p; assert p.is_cpu(), p"],
        log=log,
    )


def preloads() -> list[Path]:
    """Return the libraries that have to be loaded before vLLM: allocator, and Intel's OpenMP.

    Raises:
        RuntimeError: one has gone since the installation.
    """
    tcmalloc = find_tcmalloc()
    openmp = VLLM.folder / "env" / "lib" / "libiomp5.so"
    missing = [
        name
        for name, is_there in ((_TCMALLOC, tcmalloc is not None), (str(openmp), openmp.is_file()))
        if not is_there
    ]
    if tcmalloc is None or missing:
        raise RuntimeError(f"vLLM needs {' and '.join(missing)}; run `make peers` again")
    return [tcmalloc, openmp]


def find_tcmalloc() -> Path | None:
    """Return the allocator as the loader finds it."""
    ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"
    known = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"{re.escape(_TCMALLOC)} .*=> (\S+)", known)
    return Path(found.group(1)) if found else None
