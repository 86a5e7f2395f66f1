"""Compare what the trainer said with what the server does, and show it."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.bar import Bar
from rich.table import Table

from lorary.trainer.metrics import score_labels, score_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.registry import Manifest
    from lorary.trainer.recipe import Recipe
    from scripts.demo_calls import Answer, Session

NUM_RESAMPLES = 200
# What bfloat16 may change by itself: another kernel rounds near-ties the other way.
ALLOWANCE = {"accuracy": 0.01, "rougeL": 0.5, "bleu": 0.5, "exact_match": 0.01}
NOISE_NOTE = (
    "noise: two standard errors of the figure through the server (accuracy: binomial, ROUGE: of the "
    f"mean, BLEU: {NUM_RESAMPLES} bootstrap samples) plus what bfloat16 rounding may change "
    f"({ALLOWANCE['accuracy']:.2f} accuracy, {ALLOWANCE['bleu']} points of BLEU or ROUGE)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One line of the table; all figures are of the task's primary metric."""

    task: str
    metric: str
    num_items: int
    base: float
    adapter: float
    served: float
    noise: float
    all_base: dict[str, float]
    all_adapter: dict[str, float]
    all_served: dict[str, float]
    p50_ms: float
    version: int
    digest: str

    @property
    def is_as_promised(self) -> bool:
        """Whether the served adapter is not worse than the trainer said by more than noise."""
        return self.served >= self.adapter - self.noise


def compare(
    recipe: Recipe, manifest: Manifest, references: Sequence[str], answers: Sequence[Answer]
) -> TaskResult:
    """Score a task's answers with the trainer's own functions.

    Args:
        recipe: the task's.
        manifest: of the published version.
        references: the wanted answers, in the order of the held-out items.
        answers: of this task's adapter.
    """
    assert manifest.metrics is not None
    texts, labels = _in_order(answers, "generate"), _in_order(answers, "classify")
    if recipe.task.labels:
        scores = score_labels(labels, texts, references)
    else:
        scores = score_texts(recipe.metric, texts, references)
    metric = manifest.metrics.primary
    error = standard_error(metric, labels or texts, references)
    return TaskResult(
        task=recipe.name,
        metric=metric,
        num_items=len(references),
        base=manifest.metrics.base[metric],
        adapter=manifest.metrics.adapter[metric],
        served=round(scores[metric], 4),
        noise=round(2 * error + ALLOWANCE[metric], 4),
        all_base=manifest.metrics.base,
        all_adapter=manifest.metrics.adapter,
        all_served={name: round(value, 4) for name, value in scores.items()},
        p50_ms=round(1e3 * statistics.median(a.seconds for a in answers), 1),
        version=manifest.version,
        digest=manifest.digest,
    )


def standard_error(metric: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the standard error of a metric, on its own scale, from the items at hand."""
    count = len(references)
    if metric in ("accuracy", "exact_match"):
        pairs = zip(predictions, references, strict=True)
        share = sum(p.strip() == r.strip() for p, r in pairs) / count
        return math.sqrt(share * (1 - share) / count)
    if metric == "rougeL":
        pairs = zip(predictions, references, strict=True)
        scores = [score_texts("rouge", [p], [r])["rougeL"] for p, r in pairs]
        return statistics.stdev(scores) / math.sqrt(count) if count > 1 else 0.0
    rng = random.Random(0)
    samples = []
    for _ in range(NUM_RESAMPLES):
        drawn = rng.choices(range(count), k=count)
        sample = score_texts(
            "bleu", [predictions[i] for i in drawn], [references[i] for i in drawn]
        )
        samples.append(sample["bleu"])
    return statistics.stdev(samples)


def results_table(results: Sequence[TaskResult]) -> Table:
    """Return the one table that the demo is about."""
    table = Table(
        title="held-out items: base, adapter, and the adapter through the server",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("task", "metric", "items", "base", "adapter", "served", "noise", "p50 ms"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    table.add_column("digest", no_wrap=True)
    table.add_column("", no_wrap=True)
    for r in results:
        digits = 3 if r.metric in ("accuracy", "exact_match") else 1
        figures = [f"{value:.{digits}f}" for value in (r.base, r.adapter, r.served)]
        verdict = "[green]ok[/]" if r.is_as_promised else "[red]worse[/]"
        table.add_row(
            *(r.task, r.metric, str(r.num_items), *figures, f"±{r.noise:.{digits}f}"),
            *(f"{r.p50_ms:.0f}", r.digest.removeprefix("sha256:")[:12], verdict),
        )
    return table


def mixing_table(steps_by_distinct_adapters: Sequence[int]) -> Table:
    """Return the histogram of distinct adapters per step, as bars."""
    total = sum(steps_by_distinct_adapters) or 1
    most = max(steps_by_distinct_adapters, default=1) or 1
    table = Table(title="steps by distinct adapters in them", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapters", justify="right")
    table.add_column("steps", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", width=40)
    for distinct, steps in enumerate(steps_by_distinct_adapters):
        bar = Bar(most, 0, steps, color="cyan")
        table.add_row(str(distinct), str(steps), f"{steps / total:.0%}", bar)
    return table


def wrong_receipts(session: Session, digests: dict[str, str]) -> list[str]:
    """Return a line for every answer whose receipt names another digest than was published."""
    lines = []
    for answer in session.answers:
        call = answer.call
        wanted = "" if call.kind == "base" else digests[call.task]
        if answer.receipt.digest != wanted:
            found = answer.receipt.digest or "the bare base"
            lines.append(f"{call.task}[{call.index}] ({call.kind}) was answered by {found}")
    return lines


def _in_order(answers: Sequence[Answer], kind: str) -> list[str]:
    chosen = [a for a in answers if a.call.kind == kind]
    return [a.text for a in sorted(chosen, key=lambda a: a.call.index)]
