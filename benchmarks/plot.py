"""The picture in docs/benchmarks.md: output tokens per second against the number of adapters."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from benchmarks.report import Cell, medians

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Okabe & Ito's colours, which colour-blind readers tell apart.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#F0E442"),
)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write an SVG with one panel per number of requests at once, one line per contender."""
    import matplotlib as mpl

    mpl.use("svg")
    # The same records give the same bytes, so that a picture changes only when its data do.
    mpl.rcParams["svg.hashsalt"] = "lorary"
    import matplotlib.pyplot as plt

    found = medians(records)
    cells = sorted({cell for values in found.values() for cell in values})
    columns = sorted({cell.concurrency for cell in cells})
    counts = sorted({cell.adapters for cell in cells})
    figure, axes = plt.subplots(
        1, len(columns), figsize=(3.2 * len(columns), 3.0), squeeze=False, layout="constrained"
    )
    for axis, at_once in zip(axes[0], columns, strict=True):
        for (name, values), colour in zip(found.items(), cycle(COLOURS), strict=False):
            there = [k for k in counts if Cell(k, at_once) in values]
            speed = [values[Cell(k, at_once)].tokens_per_s for k in there]
            # Numbers of adapters side by side: from 0 to 32 no scale shows all of them.
            axis.plot([counts.index(k) for k in there], speed, "o-", color=colour, label=name)
        axis.set_title(f"{at_once} request{'s' if at_once > 1 else ''} at once", fontsize=10)
        axis.set_xticks(range(len(counts)), [str(k) for k in counts])
        axis.set_xlabel("adapters")
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("output tokens/s")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
