"""The parts of ``verify_lifecycle``: what is run, how long it takes, and what is read from it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.harness.machine import ROOT
from scripts.lifecycle_figures import lifecycle_figures, shown_figures
from scripts.measured import Measured
from scripts.verify_run import check, console, run_parts, run_tests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scripts.verify_figures import Figure

CHURN = ("LORARY_CHURN_SECONDS=60",)
TESTS = {
    "churn": ("tests/server/test_churn.py",),
    "faults": ("tests/e2e/test_adapter_faults.py", "tests/e2e/test_bad_calls.py"),
    "tiers": (
        "tests/server/test_residency.py",
        "tests/server/test_eviction.py",
        "tests/server/test_engine_life.py",
    ),
}
"""Tests that are promises of their own; ``churn`` runs for a minute here and for less in the suite."""
MINUTES = {"check": 2, "churn": 2, "faults": 2, "tiers": 1, "lifecycle": 16, "shows": 0}
"""What each part takes on two quiet cores."""


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Run this part; may be repeated. Of {', '.join(MINUTES)}."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what this very commit has measured whole.")
    ] = False,
) -> None:
    """Measure every figure that adapters in production promise, and say which is short."""
    measured = Measured("lifecycle", resume=resume)
    parts: dict[str, Callable[[], Sequence[Figure]]] = {
        "check": check,
        **{part: partial(run_tests, part, TESTS[part], variables=CHURN) for part in TESTS},
        "lifecycle": lambda: measured.part("lifecycle", "lifecycle.py", [], lifecycle_figures),
        "shows": lambda: shown_figures(ROOT),
    }
    minutes = sum(m for part, m in MINUTES.items() if not only or part in only)
    console.print(f"about {minutes} minutes on two quiet cores; less than twice that on slow ones")
    run_parts(parts, only or [], "lifecycle-figures.json")
