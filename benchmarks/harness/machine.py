"""Where a figure was measured, with which code: goes into every record."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
_PACKAGES = ("lorary", "torch", "transformers", "peft", "grpcio", "numpy")
# What decides which matrix kernels run.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")


def machine() -> dict[str, Any]:
    """Return the processor, its cores and vector units, memory and system."""
    info = _cpuinfo()
    present = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0))
        if "LORARY_BENCH_CORES" not in os.environ
        else len(os.environ["LORARY_BENCH_CORES"].split(",")),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "vector_units": [flag for flag in _FLAGS if flag in present],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of packages, by default those whose speed is measured, that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # A checkout on a path is not installed; its commit says more.
            continue
    return found


def commit() -> dict[str, Any]:
    """Return the commit of this checkout, and whether tracked files differ from it.

    A copy without its history is told its commit by ``LORARY_COMMIT``.
    """
    head = _git("rev-parse", "HEAD") or os.environ.get("LORARY_COMMIT", "")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head or "unknown", "modified": bool(changed)}


def head(benchmark: str, setup: dict[str, Any]) -> dict[str, Any]:
    """Return what every record of a benchmark begins with."""
    return {
        "benchmark": benchmark,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        **commit(),
        "machine": machine(),
        "versions": versions(),
        "setup": setup,
    }


def result_path(benchmark: str, processor: str = "") -> Path:
    """Return a new file for a benchmark's records, named after it, the processor and the time.

    ``processor`` is what the figures are of; by default this machine's CPU.
    """
    now = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    slug = _slug(processor) if processor else cpu_slug()
    return RESULTS / f"{benchmark}-{slug}-{now}.jsonl"


def newest_results(benchmark: str) -> Path:
    """Return the newest file of a benchmark's records.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(RESULTS.glob(f"{benchmark}-*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"there are no results in {RESULTS}; run the benchmark first")
    return found[-1]


def cpu_slug() -> str:
    """Return the processor's name as part of a file name."""
    name = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*", "", str(machine()["cpu"]), flags=re.IGNORECASE)
    return _slug(name) or "cpu"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
