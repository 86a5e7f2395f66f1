"""Pictures in docs/benchmarks.md; the main one is output tokens per second against the number of adapters."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.report import Cell, medians

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# Okabe & Ito's colours, which colour-blind readers tell apart; the same contender always has the same.
COLOURS = {
    "lorary": "#0072B2",
    "lorary-int8": "#56B4E9",
    "lorary (grpc)": "#0072B2",
    "peft": "#D55E00",
    "vllm": "#009E73",
    "vllm-base": "#009E73",
    "llama.cpp": "#CC79A7",
    "openvino-fp16": "#999999",
    "openvino-int8": "#E69F00",
}
OTHERS = "#000000"
_MANY = 4
"""From so many contenders on the legend stands below, where it hides no line."""


@contextmanager
def panels(path: Path, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, list[Any]]]:
    """Give a figure and its panels, side by side, to draw into; at the end write them as an SVG.

    Args:
        path: where to.
        columns: how many.
        size: inches of one, width and height.
    """
    import matplotlib as mpl

    mpl.use("svg")
    # The same records give the same bytes, so that a picture changes only when its data do.
    mpl.rcParams["svg.hashsalt"] = "lorary"
    import matplotlib.pyplot as plt

    width, height = size
    figure, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained"
    )
    yield figure, list(axes[0])
    for axis in axes[0]:
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write an SVG with one panel per number of requests at once, one line per contender."""
    found = medians(records)
    cells = sorted({cell for values in found.values() for cell in values})
    columns = sorted({cell.concurrency for cell in cells})
    counts = sorted({cell.adapters for cell in cells})
    with panels(path, len(columns), (3.2, 3.0)) as (figure, axes):
        for axis, at_once in zip(axes, columns, strict=True):
            for name, values in found.items():
                there = [k for k in counts if Cell(k, at_once) in values]
                speed = [values[Cell(k, at_once)].tokens_per_s for k in there]
                # Numbers of adapters side by side: from 0 to 32 no scale shows all of them.
                axis.plot([counts.index(k) for k in there], speed, label=name, **_style(name))
            axis.set_title(f"{at_once} request{'s' if at_once > 1 else ''} at once", fontsize=10)
            axis.set_xticks(range(len(counts)), [str(k) for k in counts])
            axis.set_xlabel("adapters")
        axes[0].set_ylabel("output tokens/s")
        if len(found) < _MANY:
            axes[0].legend(frameon=False, fontsize=9)
        else:
            lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
            figure.legend(
                lines.values(),
                lines,
                loc="outside lower center",
                ncols=4,
                frameon=False,
                fontsize=9,
            )


def _style(name: str) -> dict[str, Any]:
    """Ours are solid and wide, peers dashed; who serves one thing only has a hollow mark."""
    is_ours = name.startswith("lorary")
    colour = COLOURS.get(name, OTHERS)
    return {
        "color": colour,
        "linestyle": "-" if is_ours else "--",
        "linewidth": 2.2 if is_ours else 1.2,
        "marker": "o" if is_ours else "s",
        "markersize": 5,
        "markerfacecolor": "white" if name.endswith("-base") else colour,
    }
