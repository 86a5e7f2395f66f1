"""One trial: a fresh model, trained as a run would be, and judged by its validation losses.

The held-out test examples are taken away before the first trial and are no part of anything here: a
search that chose by them would report a figure that it had itself picked.
"""

from __future__ import annotations

import gc
import math
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna

from lorary.errors import IncompatibleAdapter, InvalidRecipe, TrainingFailed
from lorary.trainer.progress import Reporter
from lorary.trainer.search.points import recipe_at
from lorary.trainer.train import Prepared, fit_adapter, prepare, resolve_auto

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from optuna.trial import Trial

    from lorary.trainer.recipe import Recipe
    from lorary.trainer.search.study import SharedStudy

# Keys that change the rows, or how they are packed, so that data is read again.
_DATA_KEYS = frozenset({"data.max_train", "task.template", "training.packing", "training.seed"})


def prepare_without_test(recipe: Recipe) -> Prepared:
    """Read base and data as ``prepare`` does, and let go of the test examples.

    Raises:
        InvalidRecipe: there are no validation examples to judge trials by; and what ``prepare`` raises.
    """
    if recipe.data.num_validation < 1:
        raise InvalidRecipe(
            "data.num_validation is 0, and a search judges trials by the validation loss; hold some "
            "examples out, such as 64."
        )
    run = prepare(recipe)
    return replace(run, splits=replace(run.splits, test=()))


def num_validations(recipe: Recipe) -> int:
    """Return the most validation losses of a run."""
    training = recipe.training
    return math.ceil(training.max_steps / training.steps_between_evals)


def run_trials(
    run: Prepared, study: SharedStudy, scratch: Path, after_each: Callable[[], bool]
) -> None:
    """Take trials until none is left.

    Args:
        run: of the search's own recipe; from ``prepare_without_test``.
        study: joined as a worker.
        scratch: for checkpoints, which are removed with their trial.
        after_each: called after every trial; returns False to take no more.

    Raises:
        Cancelled: a signal; the trial under way will be run again.
        StorageError, CorruptArtifact, MissingDependency: no fault of a point.
    """
    while (taken := study.ask()) is not None:
        trial, point = taken
        _run_trial(run, study, trial, point, scratch / f"trial-{trial.number}")
        if not after_each():
            return


def _run_trial(
    run: Prepared, study: SharedStudy, trial: Trial, point: Mapping[str, Any], folder: Path
) -> None:
    losses: list[float] = []

    def watch(loss: float) -> None:
        losses.append(loss)
        trial.report(loss, len(losses))
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        # The model lives no longer than this call.
        fit_adapter(_at(run, point), folder / "run", None, Reporter(quiet=True), watch)
    except optuna.TrialPruned:
        study.drop(trial)
    except (InvalidRecipe, IncompatibleAdapter, TrainingFailed) as error:
        # The sampler shall know that this part of the space is bad.
        trial.report(math.inf, len(losses) + 1)
        study.drop(trial, note=str(error))
    else:
        study.tell(trial, min(losses))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()


def _at(run: Prepared, point: Mapping[str, Any]) -> Prepared:
    """Return the run with the point's recipe; data is read again only where it changes."""
    recipe = resolve_auto(recipe_at(run.recipe, point))
    # Trackers are for runs that stay; a trial is in the study.
    recipe = replace(recipe, training=replace(recipe.training, trackers=()))
    if _DATA_KEYS & set(point):
        return prepare_without_test(recipe)
    # What the kind does depends on the recipe as well.
    kind = type(run.kind)(recipe, run.base, run.tokenizer, run.builder)
    return replace(run, recipe=recipe, kind=kind)
