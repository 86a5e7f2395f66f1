"""What the trainer promises, and how each promise is read from what a part left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import report
from benchmarks.training_run import BAR_FIRST_STEP_S, BAR_RATIO, CONTENDERS, RECIPES, medians_of
from scripts.verify_figures import Figure, at_least, at_most

if TYPE_CHECKING:
    from pathlib import Path

TABLES = ("training", "methods", "kinds")
"""Sections of docs/benchmarks.md that are filled from records."""


def speed_figures(path: Path) -> list[Figure]:
    """Read how fast training is beside the plain loop, and how soon it begins."""
    records = report.read(path) if path.exists() else []
    figures = []
    for recipe in RECIPES:
        ours, plain = (medians_of(records, recipe, name) for name in CONTENDERS)
        if ours is None or plain is None:
            note = "no run on a quiet machine; see .lorary/verify/speeds.log"
            bar = f"at least {BAR_RATIO:g}"
            figures.append(
                Figure(f"{recipe}: tokens/s", "not measured", bar, is_ok=False, note=note)
            )
            continue
        ratio = ours["tokens_per_s"] / plain["tokens_per_s"]
        figures += [
            at_least(f"{recipe}: tokens/s, times the plain loop", round(ratio, 2), BAR_RATIO),
            at_most(
                f"{recipe}: seconds to the first step's end",
                round(ours["first_step_s"], 1),
                BAR_FIRST_STEP_S,
            ),
        ]
    return figures


def shown_figures(root: Path) -> list[Figure]:
    """Check that the docs show every table, with figures in it."""
    text = (root / "docs" / "benchmarks.md").read_text()
    figures = []
    for name in TABLES:
        begin, end = report.markers(name)
        rows = text.partition(begin)[2].partition(end)[0].count("\n| ")
        # A title and a rule are two.
        figures.append(at_least(f"docs/benchmarks.md: rows of '{name}'", max(0, rows - 2), 1))
    return figures
