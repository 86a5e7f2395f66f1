"""A recipe with several tasks, from which a recipe of each task is made.

A sample::

    name: assistant
    adapters: shared          # or separate: assistant-reviews and assistant-french
    tasks:
      reviews:
        task: {kind: classification, template: "…{{ text }}…", labels: [negative, positive]}
        data: {source: movie-reviews}
      french:
        task: {template: "French: {{ text }}…"}
        data: {source: jupyter-fr}
        metric: bleu
    training: {max_steps: 200}

``base``, ``method``, ``training`` and ``evaluation`` are those of a recipe with one task, and the same for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from lorary.errors import InvalidRecipe
from lorary.registry.manifest import SERVED_KINDS
from lorary.trainer.recipe import (
    DataRecipe,
    EvaluationRecipe,
    MethodRecipe,
    Metric,
    Recipe,
    TaskRecipe,
    TrainingRecipe,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEntry:
    """One of several tasks."""

    task: TaskRecipe = field(default_factory=TaskRecipe)
    """What is learned: the keys of `task` above; the first two kinds only."""
    data: DataRecipe
    """Where its examples come from, and which are held out: the keys of `data` above."""
    metric: Metric = "auto"
    """What it is measured by: `evaluation.metric` of this task."""
    weight: float = 0.0
    """For shared adapters: its share of the batches over those of the other weights; 0 everywhere is by size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksRecipe:
    """Several tasks over one base, with one method and one schedule."""

    name: str
    """What the adapter is called; separate ones are called `name-NAME`."""
    base: str = "smollm2-135m"
    """Short name, local folder or Hub id of the base."""
    description: str = ""
    """One line for people; goes into the manifests."""
    tasks: dict[str, TaskEntry]
    """By name; at least two."""
    adapters: Literal["shared", "separate"] = "shared"
    """One adapter that learns all tasks, or one for each, trained one after the other."""
    temperature: float = 1.0
    """For shared adapters without weights: a task of n rows gets a share of n^(1/temperature); 1 is by size, and the
    higher the more alike are the shares."""
    method: MethodRecipe = field(default_factory=MethodRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise InvalidRecipe(
                f"tasks has {len(self.tasks)} task; name two or more, or move its keys to the top of "
                "the recipe."
            )
        for name in self.tasks:
            if not _NAME.fullmatch(name):
                raise InvalidRecipe(
                    f"tasks has one called '{name}'; use lower-case letters, digits, '-' and '_', at "
                    "most 32."
                )
        if self.evaluation.metric != "auto":
            raise InvalidRecipe(
                f"evaluation.metric is {self.evaluation.metric} for several tasks; set "
                f"tasks.{next(iter(self.tasks))}.metric, and so on."
            )
        if self.evaluation.skip_base:
            raise InvalidRecipe(
                "evaluation.skip_base is set for several tasks, whose table says what each adapter "
                "changes of the base; remove it."
            )
        self._check_shares()
        for name, recipe in self.recipes().items():
            if recipe.task.kind not in SERVED_KINDS:
                raise InvalidRecipe(
                    f"tasks.{name}.task.kind is {recipe.task.kind}, whose model ends in a head of its "
                    f"own; several tasks are for {' and '.join(SERVED_KINDS)}. Give it its own recipe."
                )

    def recipes(self) -> dict[str, Recipe]:
        """Return the recipe of each task, by name; of separate adapters it is the one that trains it.

        Raises:
            InvalidRecipe: naming the task.
        """
        found = {}
        for name, entry in self.tasks.items():
            with about_task(name):
                found[name] = Recipe(
                    name=self.name if self.adapters == "shared" else f"{self.name}-{name}",
                    base=self.base,
                    description=self.description,
                    task=entry.task,
                    data=entry.data,
                    method=self.method,
                    training=self.training,
                    evaluation=replace(self.evaluation, metric=entry.metric),
                )
        return found

    def _check_shares(self) -> None:
        weights = {name: entry.weight for name, entry in self.tasks.items()}
        for name, weight in weights.items():
            if not 0.0 <= weight <= 1e6:
                raise InvalidRecipe(
                    f"tasks.{name}.weight is {weight:g}; it must be between 0 and 1e6."
                )
        if not 0.1 <= self.temperature <= 1000.0:
            raise InvalidRecipe(
                f"temperature is {self.temperature:g}; it must be between 0.1 and 1000."
            )
        if any(weights.values()) and not all(weights.values()):
            missing = next(name for name, weight in weights.items() if not weight)
            raise InvalidRecipe(
                f"tasks.{missing} has no weight, and others have; give one to every task or to none."
            )
        if self.temperature != 1.0 and any(weights.values()):
            raise InvalidRecipe(
                "temperature is set beside weights, which decide alone; remove one."
            )


def recipes_of(recipe: Recipe | TasksRecipe) -> dict[str, Recipe]:
    """Return the recipe of each task, by name; ``""`` is the name of the only one."""
    return {"": recipe} if isinstance(recipe, Recipe) else recipe.recipes()


@contextmanager
def about_task(name: str) -> Iterator[None]:
    """Say in every ``InvalidRecipe`` of the block which task it is about; ``""`` is the only one."""
    try:
        yield
    except InvalidRecipe as error:
        if not name:
            raise
        raise InvalidRecipe(f"tasks.{name}: {error}") from error
