"""The picture of ``lorary bench``: how long callers waited, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorary.errors import MissingDependency

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.cli.load import Outcome, Report


def draw(path: Path, outcomes: Sequence[Outcome], report: Report) -> None:
    """Draw what share of calls had waited how long, and first tokens over the run.

    Raises:
        MissingDependency: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "--plot needs matplotlib, which is not installed. Run: pip install matplotlib"
        ) from error
    answered = [o for o in outcomes if o.first_s is not None and not o.error]
    figure = Figure(figsize=(10, 4), layout="constrained")
    shares, times = figure.subplots(1, 2)
    for name, seconds in (
        ("first token", [o.first_s or 0.0 for o in answered]),
        ("next token", [gap for o in answered for gap in o.gaps_s]),
        ("whole answer", [o.end_s for o in answered]),
    ):
        shares.ecdf([1e3 * s for s in seconds] or [0.0], label=name)
    shares.set(xscale="log", xlabel="milliseconds", ylabel="share that waited no longer")
    shares.grid(alpha=0.3)
    shares.legend()
    times.scatter([o.due_s for o in answered], [1e3 * (o.first_s or 0.0) for o in answered], s=8)
    times.set(xlabel="second of the run", ylabel="milliseconds to the first token")
    times.grid(alpha=0.3)
    figure.suptitle(
        f"{report.num_answers} answers, {report.tokens_per_s:.0f} tokens/s, {sum(report.errors.values())} failed"
    )
    figure.savefig(path)
