"""The report of a run: loss curve, figures, and every held-out example with both answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorary.trainer.output import write_jsonl

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.sources import Example


def write_report(
    folder: Path,
    *,
    title: str,
    history: Sequence[dict[str, Any]],
    best_step: int,
    test: Sequence[Example],
    before: Evaluation | None,
    after: Evaluation,
) -> None:
    """Write ``loss_curve.png``, ``metrics.json``, ``history.jsonl`` and ``examples.jsonl``."""
    folder.mkdir()
    write_jsonl(folder / "history.jsonl", history)
    figures = {"base": before.metrics if before else {}, "adapter": after.metrics}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_jsonl(folder / "examples.jsonl", _example_rows(test, before, after))
    draw_loss_curve(folder / "loss_curve.png", title=title, history=history, best_step=best_step)


def draw_loss_curve(
    path: Path, *, title: str, history: Sequence[dict[str, Any]], best_step: int
) -> None:
    """Draw training and validation loss over steps, and mark the step that was kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2)
    axes.axvline(best_step, color="grey", linestyle=":", label=f"kept: step {best_step}")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per learned token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _example_rows(
    test: Sequence[Example], before: Evaluation | None, after: Evaluation
) -> list[dict[str, Any]]:
    """Return one row per held-out example."""
    rows = []
    for i, example in enumerate(test):
        answers = {"adapter": after} if before is None else {"base": before, "adapter": after}
        rows.append(
            {
                "inputs": dict(example.inputs),
                "target": example.target,
                "prediction": {name: one.predictions[i] for name, one in answers.items()},
                "generated": {name: one.generated[i] for name, one in answers.items()},
            }
        )
    return rows
