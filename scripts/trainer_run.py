"""The parts of ``verify_trainer``: what is run, how long it takes, and what is read from it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.harness.machine import ROOT
from scripts.trainer_figures import (
    fault_figures,
    memory_figures,
    report_figures,
    resumed_figures,
    search_figures,
    served_figures,
    shown_figures,
    speed_figures,
)
from scripts.verify_figures import Figure
from scripts.verify_run import FOLDER, check, console, exit_code, run, run_parts, run_tests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scripts.proven import Proof

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
        "tests/trainer/test_tasks.py",
    ),
    "report": ("tests/trainer/test_report.py",),
    "provenance": ("tests/trainer/test_reproduce.py",),
}
"""Tests that are promises of their own."""
READ: dict[str, Callable[[Sequence[Proof]], list[Figure]]] = {
    "methods": served_figures,
    "loop": resumed_figures,
    "faults": fault_figures,
    "search": search_figures,
    "report": report_figures,
}
"""Which figures are read from what these tests record."""
MINUTES = {
    "check": 2,
    **dict.fromkeys(TESTS, 1),
    "methods": 2,
    "rest": 3,
    "speeds": 10,
    "memory": 1,
    "shows": 0,
}
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
        **{part: partial(run_tests, part, TESTS[part], READ.get(part)) for part in TESTS},
        "rest": lambda: run_tests("rest", other_tests()),
        "speeds": speeds,
        "memory": memory,
        "shows": lambda: shown_figures(ROOT),
    }
    minutes = sum(m for part, m in MINUTES.items() if not only or part in only)
    console.print(f"about {minutes} minutes on two quiet cores; less than twice that on slow ones")
    run_parts(parts, only or [], "trainer-figures.json")


def other_tests() -> list[str]:
    """Return the trainer's tests that no other part runs."""
    named = tuple(file for files in TESTS.values() for file in files)
    found = sorted((ROOT / "tests/trainer").rglob("test_*.py"))
    files = [file.relative_to(ROOT).as_posix() for file in found]
    return [file for file in files if not file.startswith(named)]


def memory() -> list[Figure]:
    """Rehearse QLoRA on a GPU, and compare its memory with the arithmetic."""
    import torch

    if not torch.cuda.is_available():
        name = "qlora on a GPU: peak memory, times what arithmetic says"
        return [Figure(name, "not measured", "", is_ok=None, note="this machine has no GPU")]
    python = str(ROOT / ".venv/bin/python")
    recipe = ["recipes/sentiment.yaml", "--set", "method.name=qlora"]
    done = run("memory", [python, "-m", "lorary.trainer", *recipe, "--dry-run", "--json"])
    printed = done.log.read_text(errors="replace")
    return [exit_code("lorary train --dry-run", done), *memory_figures(printed)]


def speeds() -> list[Figure]:
    """Run the benchmark beside the plain loop and read its records."""
    out = FOLDER / "training.jsonl"
    out.unlink(missing_ok=True)
    python = str(ROOT / ".venv/bin/python")
    done = run("speeds", [python, "benchmarks/training.py", "--out", str(out)])
    return [exit_code("benchmarks/training.py", done), *speed_figures(out)]
