"""What the service promises, and how each promise is read from what a part left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import report
from benchmarks.service_run import BAR_IDLE_STREAMS, BAR_MINUTES, BAR_STREAMS, NAME, figures
from scripts.engine_figures import section_figure
from scripts.verify_figures import Figure, at_least

if TYPE_CHECKING:
    from pathlib import Path


def service_figures(path: Path) -> list[Figure]:
    """Read every figure that has a bar; what was not measured, or of less than promised, is short."""
    records = report.read(path) if path.exists() else []
    setup = records[0]["setup"] if records else {}
    found = [
        Figure(
            f"service: {name}",
            "not measured" if value is None else f"{value:.3g}",
            bar,
            is_ok=is_ok,
        )
        for name, value, bar, is_ok in figures(records)
    ]
    promised = (("many", BAR_STREAMS), ("idle", BAR_IDLE_STREAMS), ("minutes", BAR_MINUTES))
    return [*found, *(at_least(f"service: {key}", setup.get(key, 0), n) for key, n in promised)]


def shown_figures(root: Path) -> list[Figure]:
    """Check that the docs show what committed records say, and a picture of the console."""
    is_there = (root / "docs" / "console.png").exists() and "docs/console.png" in (
        root / "README.md"
    ).read_text()
    return [
        section_figure(root, NAME),
        Figure("README.md: a picture of the console", str(is_there), "True", is_ok=is_there),
    ]
