"""What adapters in production promise, and how each promise is read from the benchmark's records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import report
from benchmarks.lifecycle_run import CHURN, NAME, STILL, medians
from scripts.engine_figures import section_figure
from scripts.verify_figures import Figure, not_measured

if TYPE_CHECKING:
    from pathlib import Path

Place = tuple[str, str, str]

RATIOS: tuple[tuple[str, Place, Place, str, float], ...] = (
    (
        "p99 between tokens of hot adapters while cold ones arrive, times without loads",
        ("arrivals", CHURN, "itl_ms.p99"),
        ("arrivals", STILL, "itl_ms.p99"),
        "below",
        1.2,
    ),
    (
        "median first token from host memory, times a warm one",
        ("first token", "host", "first_token_ms.p50"),
        ("first token", "warm", "first_token_ms.p50"),
        "at most",
        1.1,
    ),
    (
        "median first token from the local disk, times a warm one",
        ("first token", "disk", "first_token_ms.p50"),
        ("first token", "warm", "first_token_ms.p50"),
        "at most",
        1.5,
    ),
    (
        "tokens/s with 4 times as many adapters as fit, share of all resident",
        ("zipf", CHURN, "output_tokens_per_s"),
        ("zipf", STILL, "output_tokens_per_s"),
        "at least",
        0.8,
    ),
)
BELOW: tuple[tuple[str, Place, float, float], ...] = (
    ("microseconds to resolve a ref, median", ("known", "", "resolve_us.p50"), 1.0, 20.0),
    ("megabytes that 10,000 known adapters add", ("known", "", "added_bytes"), 1e-6, 100.0),
)
NUM_KNOWN, NUM_COLD = 10_000, 200


def lifecycle_figures(path: Path) -> list[Figure]:
    """Read every figure that has a bar; what was not measured, or of less than promised, is short."""
    records = report.read(path) if path.exists() else []
    found = medians(records)
    figures = []
    for name, of, to, how, bar in RATIOS:
        if of not in found or to not in found:
            figures.append(not_measured(f"lifecycle: {name}", f"{how} {bar:g}"))
            continue
        ratio = found[of] / found[to]
        is_ok = {"below": ratio < bar, "at most": ratio <= bar, "at least": ratio >= bar}[how]
        note = f"{found[of]:.1f} and {found[to]:.1f}"
        figures.append(Figure(f"lifecycle: {name}", f"{ratio:.3f}", f"{how} {bar:g}", is_ok, note))
    for name, place, scale, bar in BELOW:
        if place not in found:
            figures.append(not_measured(f"lifecycle: {name}", f"below {bar:g}"))
            continue
        value = found[place] * scale
        figures.append(
            Figure(f"lifecycle: {name}", f"{value:.1f}", f"below {bar:g}", is_ok=value < bar)
        )
    setup = records[0]["setup"] if records else {}
    size = (setup.get("known", 0), setup.get("cold", 0))
    is_whole = size == (NUM_KNOWN, NUM_COLD)
    promised = f"{NUM_KNOWN} known, {NUM_COLD} cold"
    figures.append(
        Figure("lifecycle: adapters", f"{size[0]} known, {size[1]} cold", promised, is_ok=is_whole)
    )
    return figures


def shown_figures(root: Path) -> list[Figure]:
    """Check that the docs show what committed records say."""
    return [section_figure(root, NAME)]
