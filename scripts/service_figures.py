"""What the service promises, and how each promise is read from what a part left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import report, soak_run
from benchmarks.service_run import BAR_IDLE_STREAMS, BAR_STREAMS, NAME, figures
from scripts.engine_figures import section_figure
from scripts.verify_figures import Figure, at_least, at_most

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from scripts.proven import Proof

DOORS = ("gRPC", "HTTP", "sockets", "OIP gRPC", "OIP HTTP")
"""Of OIP: the Open Inference Protocol's service, and its paths below /v2."""
BAR_INPUTS, BAR_FUZZ_MB = 10_000, 24
FUZZ_INPUTS = 12_000
"""More than the bar: of inputs drawn at random, some are drawn twice and sent once."""


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
    promised = (("many", BAR_STREAMS), ("idle", BAR_IDLE_STREAMS))
    return [*found, *(at_least(f"service: {key}", setup.get(key, 0), n) for key, n in promised)]


def soak_figures(path: Path) -> list[Figure]:
    """Read what grew; a shorter soak than promised is short."""
    records = report.read(path) if path.exists() else []
    minutes = records[0]["setup"]["minutes"] if records else 0
    return [
        *(at_most(f"soak: {name}", value, most) for name, value, most in soak_run.figures(records)),
        at_least("soak: minutes", minutes, soak_run.MINUTES),
    ]


def fuzz_figures(proofs: Sequence[Proof]) -> list[Figure]:
    """Read how many inputs went through which door, what was wrong with them, and what they left behind."""
    told = dict(pair for proof in proofs for pair in proof.recorded)
    begins = "inputs through "
    counts = {k.removeprefix(begins): int(v) for k, v in told.items() if k.startswith(begins)}
    shown = ", ".join(f"{count} through {door}" for door, count in counts.items())
    total = sum(counts.values())
    return [
        Figure(
            "fuzz: inputs",
            f"{total}" + (f": {shown}" if shown else ""),
            f"at least {BAR_INPUTS}, through each of {', '.join(DOORS)}",
            is_ok=total >= BAR_INPUTS and counts.keys() >= set(DOORS),
        ),
        at_most("fuzz: faults", _number(told.get("faults")), 0),
        at_most("fuzz: MB of memory more", _number(told.get("megabytes more")), BAR_FUZZ_MB),
    ]


def _number(told: str | None) -> float | None:
    return None if told is None else float(told)


def shown_figures(root: Path) -> list[Figure]:
    """Check that the docs show what committed records say, and a picture of the console."""
    is_there = (root / "docs" / "console.png").exists() and "docs/console.png" in (
        root / "README.md"
    ).read_text()
    return [
        section_figure(root, NAME),
        section_figure(root, soak_run.NAME),
        Figure("README.md: a picture of the console", str(is_there), "True", is_ok=is_there),
    ]
