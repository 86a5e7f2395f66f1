"""The parts of ``verify_trainer``: what is run, how long it takes, and what is read from it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.harness.machine import ROOT
from scripts.trainer_figures import shown_figures, speed_figures
from scripts.verify_run import FOLDER, check, console, exit_code, run, run_parts, run_tests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scripts.verify_figures import Figure

TESTS = {
    "methods": ("tests/trainer/methods",),
    "kinds": (
        "tests/trainer/test_kinds.py",
        "tests/registry/test_task_heads.py",
        "tests/test_example_modules.py",
    ),
    "data": (
        "tests/trainer/test_data.py",
        "tests/trainer/test_shapes.py",
        "tests/trainer/test_encoding.py",
        "tests/trainer/test_packing.py",
        "tests/trainer/test_streaming.py",
        "tests/trainer/test_served_template.py",
    ),
    "loop": (
        "tests/trainer/test_train.py",
        "tests/trainer/test_loop.py",
        "tests/trainer/test_estimate.py",
        "tests/trainer/test_resume.py",
    ),
    "faults": ("tests/trainer/test_faults.py", "tests/trainer/test_recipe.py"),
    "search": ("tests/trainer/test_search.py",),
    "plans": ("tests/trainer/test_quantplan.py",),
    "evaluation": (
        "tests/trainer/test_evaluate.py",
        "tests/trainer/test_bootstrap.py",
        "tests/trainer/test_eval_cli.py",
    ),
    "report": ("tests/trainer/test_report.py",),
    "provenance": ("tests/trainer/test_reproduce.py",),
}
"""Tests that are promises of their own."""
MINUTES = {"check": 2, **dict.fromkeys(TESTS, 1), "speeds": 10, "shows": 0}
"""What each part takes on two quiet cores."""


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Run this part; may be repeated. Of {', '.join(MINUTES)}."),
    ] = None,
) -> None:
    """Measure every figure that the trainer promises, and say which is short."""
    parts: dict[str, Callable[[], Sequence[Figure]]] = {
        "check": check,
        **{part: partial(run_tests, part, files) for part, files in TESTS.items()},
        "speeds": speeds,
        "shows": lambda: shown_figures(ROOT),
    }
    minutes = sum(m for part, m in MINUTES.items() if not only or part in only)
    console.print(f"about {minutes} minutes on two quiet cores; less than twice that on slow ones")
    run_parts(parts, only or [], "trainer-figures.json")


def speeds() -> list[Figure]:
    """Run the benchmark beside the plain loop and read its records."""
    out = FOLDER / "training.jsonl"
    out.unlink(missing_ok=True)
    python = str(ROOT / ".venv/bin/python")
    done = run("speeds", [python, "benchmarks/training.py", "--out", str(out)])
    return [exit_code("benchmarks/training.py", done), *speed_figures(out)]
