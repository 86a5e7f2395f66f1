"""What base and adapter answered to the held-out examples of each task of a run, and the figures of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lorary.registry.manifest import Metrics
from lorary.trainer.metrics import metrics_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorary.trainer.data import Splits
    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One task of a run, measured.

    Attributes:
        recipe: of the task.
        splits: its data; the answers are to ``splits.test``.
        before: the base's answers; ``None`` if it was not asked.
        after: the adapter's.
        metrics: of both.
        uncut: the adapter beside what was trained, as its base, where less than that is published.
    """

    recipe: Recipe
    splits: Splits
    before: Evaluation | None
    after: Evaluation
    metrics: Metrics
    uncut: Metrics | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        splits: Splits,
        before: Evaluation | None,
        after: Evaluation,
        uncut: Evaluation | None = None,
    ) -> Self:
        """Return the answers with their figures; ``uncut`` are the answers of what was trained."""
        seed = recipe.training.seed
        return cls(
            recipe=recipe,
            splits=splits,
            before=before,
            after=after,
            metrics=metrics_of(recipe, before, after, seed),
            uncut=None if uncut is None else metrics_of(recipe, uncut, after, seed),
        )

    @property
    def sides(self) -> dict[str, Evaluation]:
        """The answers by who gave them."""
        found = {"adapter": self.after}
        return found if self.before is None else {"base": self.before, **found}


def figures_of(answered: Mapping[str, Answered]) -> Metrics:
    """Return the figures of a run: of several tasks those of all, as ``task/metric``.

    Args:
        answered: by task; the only task of a run has the name ``""``.
    """
    return _joined({name: one.metrics for name, one in answered.items()})


def uncut_figures_of(answered: Mapping[str, Answered]) -> Metrics | None:
    """Return the figures of the adapter beside what was trained, named as those of ``figures_of``."""
    found = {name: one.uncut for name, one in answered.items() if one.uncut is not None}
    return _joined(found) if found else None


def _joined(named: Mapping[str, Metrics]) -> Metrics:
    if [*named] == [""]:
        return named[""]
    first, metrics = next(iter(named.items()))
    return Metrics(
        primary=f"{first}/{metrics.primary}",
        num_examples=sum(one.num_examples for one in named.values()),
        base={f"{name}/{key}": v for name, one in named.items() for key, v in one.base.items()},
        adapter={
            f"{name}/{key}": v for name, one in named.items() for key, v in one.adapter.items()
        },
        uncertainty={
            f"{name}/{key}": v for name, one in named.items() for key, v in one.uncertainty.items()
        },
        confidence=metrics.confidence,
    )
