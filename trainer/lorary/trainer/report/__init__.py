"""The report of a run: one page that opens anywhere, its pictures as files, and its numbers as JSON.

report/
    report.html                        everything below in one file; nothing is loaded from elsewhere
    loss_curve.png  schedule.png       what happened while it trained
    weight_change.png  effective_rank.png  singular_values.png    what it did to the weights
    attention-1.png …                  what it did to attention
    confusion.png  reliability.png     of a classification; of several tasks confusion-TASK.png …
    metrics.json  weights.json  history.jsonl  examples.jsonl
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lorary.registry.durable import replace, storage_errors, unused_name, write_new
from lorary.trainer.forgetting import ForgettingTable
from lorary.trainer.metrics import confusion, reliability
from lorary.trainer.output import write_jsonl
from lorary.trainer.report import figures
from lorary.trainer.report.examples import example_rows
from lorary.trainer.report.page import Figure, render, with_forgetting
from lorary.trainer.report.weights import write_changes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.registry.manifest import Manifest, Metrics
    from lorary.trainer.answered import Answered
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.report.inside import Inside

REPORT_FILE = "report.html"
METRICS_FILE = "metrics.json"
FORGETTING_KEY = "forgetting"


def write_report(
    folder: Path,
    *,
    recipe: Recipe,
    manifest: Manifest,
    answered: Mapping[str, Answered],
    history: Sequence[dict[str, Any]],
    best_step: int,
    inside: Inside | None,
    uncut: Metrics | None = None,
) -> None:
    """Write the folder of a report; it must not exist.

    Args:
        folder: to be made.
        recipe: of the run, without ``auto``.
        manifest: of its output.
        answered: what was answered to the held-out examples, by task; ``""`` is the only one.
        history: what each step and validation logged.
        best_step: whose weights were kept.
        inside: what it did to weights and attention; ``None`` writes the numbers and no page.
        uncut: the adapter beside what was trained, as its ``base``, where less than that is published.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir()
    details = {name: _details(one) for name, one in answered.items()}
    table = _forgetting(recipe, manifest, answered)
    write_jsonl(folder / "history.jsonl", history)
    rows = [
        ({"task": name} if name else {}) | row
        for name, one in answered.items()
        for row in example_rows(one.splits.test, one.before, one.after)
    ]
    write_jsonl(folder / "examples.jsonl", rows)
    _write_json(folder / METRICS_FILE, _metrics(manifest, details, uncut, table))
    if inside is None:
        return
    if inside.weights:
        write_changes(folder / "weights.json", inside.weights)
    drawn = _draw(history, best_step, inside, details, answered)
    for figure in drawn:
        (folder / figure.file).write_bytes(figure.png)
    page = render(
        recipe=recipe,
        manifest=manifest,
        answered=answered,
        figures=drawn,
        inside=inside,
        uncut=uncut,
        forgetting=table,
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")


def _forgetting(
    recipe: Recipe, manifest: Manifest, answered: Mapping[str, Answered]
) -> ForgettingTable | None:
    """Return the table of one adapter on its several tasks."""
    if len(answered) < 2:
        return None
    measured = ((recipe.name, name, one.metrics) for name, one in answered.items())
    return ForgettingTable.of(manifest.base.name, measured)


def _details(answered: Answered) -> dict[str, dict[str, Any]]:
    """Return confusion matrices and reliability bins of a classification, by model."""
    task = answered.recipe.task
    labels, references = task.labels, [example.target for example in answered.splits.test]
    found: dict[str, dict[str, Any]] = {"confusion": {}, "reliability": {}}
    if not task.target_is_label:
        return found
    for who, side in answered.sides.items():
        found["confusion"][who] = confusion(side.predictions, references, labels)
        if side.label_probabilities:
            sure = [max(row) for row in side.label_probabilities]
            is_right = [p == r for p, r in zip(side.predictions, references, strict=True)]
            found["reliability"][who] = reliability(sure, is_right)
    return found


def _metrics(
    manifest: Manifest,
    details: Mapping[str, dict[str, dict[str, Any]]],
    uncut: Metrics | None,
    table: ForgettingTable | None,
) -> dict[str, Any]:
    """Return the manifest's metrics, what those of a classification hide, and the forgetting table."""
    plain: dict[str, Any] = json.loads(manifest.to_json())["metrics"]
    for task, parts in details.items():
        found = {name: one for name, one in parts.items() if one}
        if task and found:
            plain.setdefault("tasks", {})[task] = found
        else:
            plain |= found
    if uncut is not None:
        plain["uncut"] = dataclasses.asdict(uncut)
    return plain | ({FORGETTING_KEY: table.as_json()} if table else {})


def _draw(
    history: Sequence[dict[str, Any]],
    best_step: int,
    inside: Inside,
    details: Mapping[str, dict[str, dict[str, Any]]],
    answered: Mapping[str, Answered],
) -> list[Figure]:
    """Draw every picture that this run has."""
    found = [
        Figure("loss_curve.png", "Loss while training", figures.loss_curve(history, best_step))
    ]
    over_steps = figures.schedule(history)
    if over_steps is not None:
        found.append(Figure("schedule.png", "Learning rate and gradient norm", over_steps))
    for task, one in answered.items():
        found += _draw_labels(task, details[task], one.recipe.task.labels)
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
            caption += f"; the first {kept} directions are published"
        others = [(f"beside: {other.name}", other.weights) for other in inside.beside]
        png = figures.spectrum([("this run", with_values), *others], kept)
        found.append(Figure("singular_values.png", caption, png))
    return found


def _draw_labels(
    task: str, details: dict[str, dict[str, Any]], labels: Sequence[str]
) -> list[Figure]:
    """Draw what there is to see of a classification."""
    found, suffix, of = [], f"-{task}" if task else "", f" of {task}" if task else ""
    if details["confusion"]:
        png = figures.confusion_matrices(details["confusion"], labels)
        found.append(Figure(f"confusion{suffix}.png", f"Confusion of labels{of}", png))
    if details["reliability"]:
        png = figures.reliability_diagram(details["reliability"])
        caption = f"Reliability{of}: how often a model is right, by how sure it is; dots grow with examples"
        found.append(Figure(f"reliability{suffix}.png", caption, png))
    return found


def read_forgetting(folder: Path) -> ForgettingTable:
    """Return the table of a report of several tasks."""
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    return ForgettingTable.from_json(metrics[FORGETTING_KEY])


def add_forgetting(folder: Path, table: ForgettingTable) -> None:
    """Put a table into a report that is finished, for what it compares was not there before; replaces an older one.

    Args:
        folder: of the report.
        table: of this adapter and others.

    Raises:
        StorageError: it cannot be written; every file is the old or the new one.
    """
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    with storage_errors(f"write to '{folder}'"):
        written = json.dumps(metrics | {FORGETTING_KEY: table.as_json()}, indent=2) + "\n"
        _rewrite(folder / METRICS_FILE, written)
        page = folder / REPORT_FILE
        if page.is_file():
            _rewrite(page, with_forgetting(page.read_text(encoding="utf-8"), table))


def _rewrite(path: Path, text: str) -> None:
    """Replace a file by one rename."""
    staged = unused_name(path.parent, "draft")
    write_new(staged, text.encode(), mode=0o644)
    replace(staged, path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
