"""The report of a run: one page that opens anywhere, its pictures as files, and its numbers as JSON.

report/
    report.html                        everything below in one file; nothing is loaded from elsewhere
    loss_curve.png  schedule.png       what happened while it trained
    weight_change.png  effective_rank.png  singular_values.png    what it did to the weights
    attention-1.png …                  what it did to attention
    confusion.png  reliability.png     of a classification
    metrics.json  weights.json  history.jsonl  examples.jsonl
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lorary.trainer.metrics import confusion, reliability
from lorary.trainer.output import write_jsonl
from lorary.trainer.report import figures
from lorary.trainer.report.examples import compare_examples, example_rows
from lorary.trainer.report.page import Figure, render
from lorary.trainer.report.weights import summary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.registry.manifest import Manifest, Metrics
    from lorary.trainer.data import Splits
    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.examples import Example
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.report.inside import Inside

REPORT_FILE = "report.html"


def write_report(
    folder: Path,
    *,
    recipe: Recipe,
    manifest: Manifest,
    splits: Splits,
    history: Sequence[dict[str, Any]],
    best_step: int,
    before: Evaluation | None,
    after: Evaluation,
    inside: Inside | None,
    uncut: Metrics | None = None,
) -> None:
    """Write the folder of a report; it must not exist.

    Args:
        folder: to be made.
        recipe: of the run, without ``auto``.
        manifest: of its output.
        splits: its data.
        history: what each step and validation logged.
        best_step: whose weights were kept.
        before: what the base answered to ``splits.test``; ``None`` if it was not asked.
        after: what the adapter answered.
        inside: what it did to weights and attention; ``None`` writes the numbers and no page.
        uncut: the adapter beside what was trained, as its ``base``, where less than that is published.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir()
    sides = {"adapter": after} if before is None else {"base": before, "adapter": after}
    details = _details(sides, recipe, splits.test)
    write_jsonl(folder / "history.jsonl", history)
    write_jsonl(folder / "examples.jsonl", example_rows(splits.test, before, after))
    _write_json(folder / "metrics.json", _metrics(manifest, details, uncut))
    if inside is None:
        return
    if inside.weights:
        _write_json(folder / "weights.json", summary(inside.weights))
    drawn = _draw(history, best_step, inside, details, recipe.task.labels)
    for figure in drawn:
        (folder / figure.file).write_bytes(figure.png)
    assert manifest.metrics is not None
    outcomes = compare_examples(splits.test, before, after, manifest.metrics.primary)
    page = render(
        recipe=recipe,
        manifest=manifest,
        splits=splits,
        figures=drawn,
        outcomes=outcomes,
        inside=inside,
        uncut=uncut,
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")


def _details(
    sides: dict[str, Evaluation], recipe: Recipe, test: Sequence[Example]
) -> dict[str, dict[str, Any]]:
    """Return confusion matrices and reliability bins of a classification, by model."""
    labels, references = recipe.task.labels, [example.target for example in test]
    found: dict[str, dict[str, Any]] = {"confusion": {}, "reliability": {}}
    if not recipe.task.target_is_label:
        return found
    for who, side in sides.items():
        found["confusion"][who] = confusion(side.predictions, references, labels)
        if side.label_probabilities:
            sure = [max(row) for row in side.label_probabilities]
            is_right = [p == r for p, r in zip(side.predictions, references, strict=True)]
            found["reliability"][who] = reliability(sure, is_right)
    return found


def _metrics(
    manifest: Manifest, details: dict[str, dict[str, Any]], uncut: Metrics | None
) -> dict[str, Any]:
    """Return the manifest's metrics and, of a classification, what they hide."""
    plain: dict[str, Any] = json.loads(manifest.to_json())["metrics"]
    found = plain | {name: one for name, one in details.items() if one}
    return found if uncut is None else found | {"uncut": dataclasses.asdict(uncut)}


def _draw(
    history: Sequence[dict[str, Any]],
    best_step: int,
    inside: Inside,
    details: dict[str, dict[str, Any]],
    labels: Sequence[str],
) -> list[Figure]:
    """Draw every picture that this run has."""
    found = [
        Figure("loss_curve.png", "Loss while training", figures.loss_curve(history, best_step))
    ]
    over_steps = figures.schedule(history)
    if over_steps is not None:
        found.append(Figure("schedule.png", "Learning rate and gradient norm", over_steps))
    if details["confusion"]:
        png = figures.confusion_matrices(details["confusion"], labels)
        found.append(Figure("confusion.png", "Confusion of labels", png))
    if details["reliability"]:
        png = figures.reliability_diagram(details["reliability"])
        caption = (
            "Reliability: how often a model is right, by how sure it is; dots grow with examples"
        )
        found.append(Figure("reliability.png", caption, png))
    for number, change in enumerate(inside.attention, 1):
        caption = (
            f"Attention on held-out prompt {number}: its last {len(change.tokens)} tokens in the layer "
            "that changes most, and the share of attention that moved in every head"
        )
        found.append(Figure(f"attention-{number}.png", caption, figures.attention(change)))
    if inside.weights:
        caption = "Change of every module, beside the size of its weight"
        found.append(Figure("weight_change.png", caption, figures.change_map(inside.weights)))
    with_values = [one for one in inside.weights if one.singular_values]
    if with_values:
        caption = "Effective rank of every module's change"
        found.append(Figure("effective_rank.png", caption, figures.rank_map(with_values)))
        caption = "Singular values of every module's change"
        kept = max((one.published_rank or 0 for one in with_values), default=0)
        if kept:
            caption += f"; what is left of direction {kept} is published"
        others = [(f"beside: {other.name}", other.weights) for other in inside.beside]
        png = figures.spectrum([("this run", with_values), *others], kept)
        found.append(Figure("singular_values.png", caption, png))
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
