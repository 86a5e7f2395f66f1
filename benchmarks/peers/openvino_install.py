"""OpenVINO GenAI: one environment that serves, and one with what exports a base for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers import steps
from benchmarks.peers.catalog import OPENVINO

if TYPE_CHECKING:
    from pathlib import Path


def exporter() -> Path:
    """Return the program that exports a model."""
    return OPENVINO.folder / "env-export" / "bin" / "optimum-cli"


def install() -> None:
    """Install both, and see that they can be imported."""
    log = OPENVINO.folder / "install.log"
    serving, *exporting = OPENVINO.recipe
    python = steps.make_environment(OPENVINO.folder / "env", log=log)
    steps.pip_install(python, [serving], log=log)
    steps.run("importing openvino_genai", [python, "-c", "import openvino_genai"], log=log)
    python = steps.make_environment(OPENVINO.folder / "env-export", log=log)
    steps.pip_install(python, exporting, log=log)
    # Its CUDA build breaks the import of transformers on a machine without CUDA.
    steps.pip_uninstall(python, ["torchvision"], log=log)
    steps.run(
        "importing the exporter",
        [python, "-c", "from optimum.exporters.openvino import main_export"],
        log=log,
    )
