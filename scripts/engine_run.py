"""The parts of ``verify_engine``: what is run, how long it takes, and what is read from it."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.harness.machine import ROOT
from scripts.engine_figures import (
    exactness_figures,
    matrix_figures,
    mix_figures,
    roofline_figures,
    share_figures,
    shown_figures,
    step_figures,
)
from scripts.gpu_figures import gpu_figures
from scripts.measured import Measured
from scripts.verify_figures import Figure
from scripts.verify_run import check, console, exit_code, run, run_parts, test

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CELLS = "32x32,8x8,0x8,0x32,0x1,1x1"
CONTENDERS = "lorary,lorary-int8,peft,vllm,vllm-base,llama.cpp,openvino-fp16,openvino-int8"
REPEATS = 3
SHARE_REPEATS = 11
ROUNDS = 1
"""As many requests as there are at once, and eight at least: the slow peers decide how long it takes."""
MINUTES = {
    "peers": 1,
    "check": 2,
    "test": 15,
    "step": 1,
    "roofline": 4,
    "exactness": 8,
    "mixes": 8,
    "share": 9,
    "matrix": 35,
    "gpu": 0,
    "shows": 0,
}
"""What each part takes on two quiet cores, peers installed; installing them takes half an hour once.

The matrix: a run of 32 answers of 64 tokens takes all contenders together two minutes at 32 adapters,
and the slow ones most of it; three repeats of six cells take 20 minutes. The rest is starting the
peers and comparing their answers. A machine that multiplies at half the speed takes twice as long."""


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Run this part; may be repeated. Of {', '.join(MINUTES)}."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what this very commit has measured whole.")
    ] = False,
) -> None:
    """Measure every figure that the engine promises, and say which is short."""
    measured = Measured("engine", resume=resume)
    parts: dict[str, Callable[[], Sequence[Figure]]] = {
        "peers": peers,
        "check": check,
        "test": test,
        "step": lambda: measured.part("step", "step.py", [], step_figures),
        "roofline": lambda: measured.part("roofline", "roofline.py", [], roofline_figures),
        "exactness": lambda: measured.part("exactness", "exactness.py", [], exactness_figures),
        "mixes": lambda: measured.part("mixes", "mixes.py", [], mix_figures),
        "share": lambda: measured.part("share", "serving.py", _share_options(), share_figures),
        "matrix": lambda: measured.part("matrix", "serving.py", _matrix_options(), matrix_figures),
        "gpu": lambda: gpu(measured),
        "shows": lambda: shown_figures(ROOT),
    }
    minutes = sum(m for part, m in MINUTES.items() if not only or part in only)
    console.print(
        f"about {minutes} minutes on two quiet cores, without installing peers; less than twice that on slow ones"
    )
    run_parts(parts, only or [], "engine-figures.json")


def peers() -> list[Figure]:
    """Install what the matrix is measured against; a peer that is there takes no time."""
    return [exit_code("make peers", run("peers", ["make", "peers"]))]


def gpu(measured: Measured) -> list[Figure]:
    """Test and measure on a GPU where there is one."""
    if not _has_gpu():
        name = "GPU: decode with 32 adapters, tokens/s, times PEFT"
        return [Figure(name, "not run: no GPU", "see docs/benchmarks.md", is_ok=None)]
    python = str(ROOT / ".venv/bin/python")
    tests = exit_code(
        "pytest -m gpu", run("gpu-tests", [python, "-m", "pytest", "-q", "-m", "gpu"])
    )
    return [tests, *measured.part("gpu", "gpu.py", [], gpu_figures)]


def _matrix_options() -> list[str]:
    return [
        "--name",
        "peers",
        "--cells",
        CELLS,
        "--contenders",
        CONTENDERS,
        "--repeats",
        str(REPEATS),
        "--rounds",
        str(ROUNDS),
    ]


def _share_options() -> list[str]:
    """With adapters and without, in turn: minutes apart, a shared machine is not the same one."""
    cells, repeats = "32x32,0x32,8x8,0x8,1x1,0x1", str(SHARE_REPEATS)
    options = ["--name", "share", "--cells", cells, "--contenders", "lorary"]
    return [*options, "--repeats", repeats, "--rounds", str(ROUNDS), "--interleave"]


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout
