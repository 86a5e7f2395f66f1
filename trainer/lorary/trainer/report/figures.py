"""The pictures of a report: PNGs with a clear ground, drawn in inks that read on light and dark."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorary.trainer.report.attention import AttentionChange
    from lorary.trainer.report.weights import ModuleChange

_INK = "#7a808a"
_BLUE, _ORANGE = "#3b82c4", "#d9782d"
_COLOURS = (_BLUE, _ORANGE, "#3f9b5c", "#9a5fb4")
_MANY_DIRECTIONS = 64
_STYLE: Any = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.framealpha": 0.0,
    "grid.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": f"cycler('color', ['{_BLUE}', '{_ORANGE}'])",
    # Texts are data's, and a dollar sign in them is no formula.
    "text.parse_math": False,
}
_DPI = 130


def picture(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    """Return the PNG of what ``draw`` puts onto an empty figure of so many inches."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=_DPI, transparent=True, format="png")
    return buffer.getvalue()


def loss_curve(history: Sequence[Mapping[str, Any]], best_step: int) -> bytes:
    """Draw training and validation loss over steps, and mark the step that was kept."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
            points = _points(history, key)
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2)
        axes.axvline(best_step, color=_INK, linestyle=":", label=f"kept: step {best_step}")
        axes.set(xlabel="step", ylabel="loss (nats per learned token)")
        axes.grid(alpha=0.25)
        axes.legend()

    return picture(draw, 7, 3.6)


def schedule(history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draw learning rate and gradient norm over steps; ``None`` where neither was logged."""
    panels = [
        (label, points)
        for key, label in (
            ("learning_rate", "learning rate"),
            ("grad_norm", "gradient norm, before clipping"),
        )
        if (points := _points(history, key))
    ]
    if not panels:
        return None

    def draw(figure: Any) -> None:
        for axes, (label, points) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.plot(*zip(*points, strict=True), linewidth=1.2)
            axes.set(xlabel="step", title=label)
            axes.grid(alpha=0.25)

    return picture(draw, 7, 2.6)


def change_map(changes: Sequence[ModuleChange]) -> bytes:
    """Draw ‖ΔW‖ / ‖W‖ of every module: layers across, kinds of module down."""
    return _module_map(changes, {one.name: one.ratio for one in changes}, "‖ΔW‖ / ‖W‖")


def rank_map(changes: Sequence[ModuleChange]) -> bytes:
    """Draw the effective rank of ΔW of every module."""
    return _module_map(
        changes, {one.name: one.effective_rank for one in changes}, "effective rank of ΔW"
    )


def spectrum(runs: Sequence[tuple[str, Sequence[ModuleChange]]], published_rank: int = 0) -> bytes:
    """Draw the singular values of every module's ΔW beside its largest one.

    Args:
        runs: name and modules of each; it has a colour.
        published_rank: where to draw a line; 0 draws none.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, (run, changes) in enumerate(runs):
            label: str | None = run if len(runs) > 1 else None
            for one in changes:
                if not one.singular_values:
                    continue
                values = [value / one.singular_values[0] for value in one.singular_values]
                places = range(1, len(values) + 1)
                colour = _COLOURS[number % len(_COLOURS)]
                axes.plot(places, values, color=colour, alpha=0.25, linewidth=0.8, label=label)
                label = None
        if published_rank:
            name = f"published: {published_rank}"
            axes.axvline(published_rank, color=_INK, linestyle=":", label=name)
        longest = max(len(one.singular_values) for _, found in runs for one in found)
        # A few directions of LoRA beside hundreds of full fine-tuning.
        scale = "log" if longest > _MANY_DIRECTIONS else "linear"
        axes.set(xlabel="direction", ylabel="singular value / largest", yscale="log", xscale=scale)
        for axis in (axes.xaxis, axes.yaxis):
            # A logarithmic axis writes its numbers as formulas, which are not read here.
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            for handle in axes.legend().legend_handles:
                handle.set_alpha(1)

    return picture(draw, 7, 3)


def attention(change: AttentionChange) -> bytes:
    """Draw one layer's attention before, after, and how much moved in every head of every layer."""

    def draw(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
        size = len(change.tokens)
        # The first token soaks up most attention, so the rest decides about the scale.
        rest = [one[:, 1:] if size > 1 else one for one in (change.before, change.after)]
        top = max(float(one.max()) for one in rest) or 1.0
        names = [_visible(token) for token in change.tokens]
        for axes, values, title in (
            (left, change.before, f"layer {change.layer}, base"),
            (middle, change.after, f"layer {change.layer}, with the adapter"),
        ):
            image = axes.imshow(values.numpy(), vmin=0, vmax=top, cmap="viridis")
            axes.set_title(title)
            axes.set_xticks(range(size), names, rotation=90, fontsize=6)
            axes.set_yticks(range(size), names, fontsize=6)
        left.set_ylabel("from")
        figure.colorbar(image, ax=[left, middle], shrink=0.6, label="attention, mean of heads")
        moved = right.imshow(change.moved.numpy(), vmin=0, cmap="magma", aspect="auto")
        right.set(title="attention that moved", xlabel="head", ylabel="layer")
        figure.colorbar(moved, ax=right, shrink=0.6)

    return picture(draw, 12, 4.6)


def confusion_matrices(
    matrices: Mapping[str, Sequence[Sequence[int]]], labels: Sequence[str]
) -> bytes:
    """Draw one matrix per model: true labels down, predicted ones across."""

    def draw(figure: Any) -> None:
        names = [_visible(label, 18) for label in labels]
        has_numbers = len(labels) <= _MAX_NUMBERED
        for axes, (who, matrix) in zip(
            figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True
        ):
            top = max(max(map(max, matrix)), 1)
            axes.imshow(matrix, cmap="Blues", vmin=0, vmax=top)
            axes.set(title=who, xlabel="predicted", ylabel="true")
            axes.set_xticks(range(len(labels)), names, rotation=45, ha="right")
            axes.set_yticks(range(len(labels)), names)
            for i, row in enumerate(matrix if has_numbers else ()):
                for j, count in enumerate(row):
                    colour = "white" if count > top / 2 else "#20242a"
                    axes.text(j, i, str(count), ha="center", va="center", color=colour)

    side = min(2.6 + 0.25 * len(labels), 6.0)
    return picture(draw, side * len(matrices) + 0.6, side)


def reliability_diagram(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Draw accuracy over confidence: on the diagonal a model is as often right as it is sure."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(bins), squeeze=False, sharey=True)[0]
        for axes, (who, found) in zip(panels, bins.items(), strict=True):
            total = sum(one["count"] for one in found)
            axes.plot([0, 1], [0, 1], color=_INK, linestyle=":")
            axes.bar(
                [one["low"] for one in found],
                [one["accuracy"] for one in found],
                width=[one["high"] - one["low"] for one in found],
                align="edge",
                color=_BLUE,
                alpha=0.35,
            )
            axes.scatter(
                [one["confidence"] for one in found],
                [one["accuracy"] for one in found],
                s=[20 + 180 * one["count"] / total for one in found],
                color=_ORANGE,
                zorder=3,
            )
            axes.set(title=who, xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
        panels[0].set_ylabel("accuracy")

    return picture(draw, 3.4 * len(bins) + 0.4, 3.2)


_MAX_NUMBERED = 20


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def _module_map(changes: Sequence[ModuleChange], values: Mapping[str, float], label: str) -> bytes:
    kinds = list(dict.fromkeys(one.kind for one in changes))
    # A model without numbered layers has one column.
    layers = sorted({one.layer or 0 for one in changes})
    grid = [[float("nan")] * len(layers) for _ in kinds]
    for one in changes:
        grid[kinds.index(one.kind)][layers.index(one.layer or 0)] = values[one.name]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
        axes.set_yticks(range(len(kinds)), kinds)
        step = max(1, len(layers) // 16)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes, label=label)

    return picture(draw, 7, 1.2 + 0.28 * len(kinds))


def _visible(text: str, limit: int = 12) -> str:
    """Show white space, and cut what is long."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
