"""A whole search: a folder with a study, workers that fill it, the best trial, the report.

runs/sentiment.search/
    recipe.json    what every worker reads, with nothing left to decide
    study.sqlite   the trials; any number of processes may work on it
    best.yaml      the recipe at the best point, ready for ``lorary train``
    trials.jsonl   one line per trial
    report.html    history, importance, parallel coordinates, curves; no other file needed
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

from lorary.errors import Cancelled, ConfigError, InvalidRecipe, StorageError, TrainingFailed
from lorary.trainer.checkpoints import run_identity
from lorary.trainer.output import write_jsonl
from lorary.trainer.recipe_file import build_recipe, recipe_dict
from lorary.trainer.search.points import recipe_at
from lorary.trainer.search.report import write_search_report
from lorary.trainer.search.study import DATABASE, SharedStudy, TrialResult, create_study
from lorary.trainer.search.trial import num_validations, prepare_without_test, run_trials

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.train import Prepared

_POLL_S = 0.3
_ENDED = ("complete", "pruned", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        recipe: at the best point, without the search.
        best: the complete trial with the least validation loss.
        trials: all of them in order.
        importances: each key's share in how trials differ, the largest first.
        seconds: of this call.
    """

    recipe: Recipe
    best: TrialResult
    trials: tuple[TrialResult, ...]
    importances: dict[str, float]
    seconds: float

    @property
    def origin(self) -> dict[str, Any]:
        """What the manifest of the retrained best trial says about the search."""
        return {
            "search": {
                "num_trials": len(self.trials),
                "num_pruned": sum(trial.state == "pruned" for trial in self.trials),
                "best_trial": self.best.number,
                "best_validation_loss": self.best.loss,
                "point": self.best.point,
            }
        }


def search(
    recipe: Recipe,
    folder: Path,
    *,
    workers: int = 1,
    resume: bool = False,
    force: bool = False,
    reporter: Reporter,
) -> SearchResult:
    """Run trials until there are as many as the recipe wants, and report on them.

    Args:
        recipe: with a search section.
        folder: of the study.
        workers: processes that run trials side by side; 1 is this one.
        resume: go on with the study in the folder, or help those who work on it.
        force: drop an earlier study.
        reporter: told of every trial.

    Raises:
        InvalidRecipe: no space, no validation examples, or what ``prepare`` finds.
        AlreadyExists, IncompatibleAdapter: a study is there; it is of something else.
        TrainingFailed: no trial was trained to its end.
        Cancelled: SIGINT or SIGTERM; ``resume`` goes on.
        StorageError: the folder cannot be written.
    """
    started = time.monotonic()
    if not recipe.search.space:
        raise InvalidRecipe(
            "the recipe has no search.space; add one, such as "
            "search: {space: {method.rank: [4, 8, 16]}}."
        )
    run = prepare_without_test(recipe)
    identity = _identity(run)
    if force:
        _drop(folder)
    if not resume:
        try:
            create_study(folder, run.recipe.search, identity)
        except OSError as error:
            raise StorageError(f"'{folder}' cannot be written: {error.strerror}.") from error
    study = SharedStudy(folder, run.recipe.search, num_validations(run.recipe))
    study.check_identity(identity)
    (folder / "recipe.json").write_text(json.dumps(recipe_dict(run.recipe)), encoding="utf-8")
    reporter.note(_headline(run.recipe, folder, workers))
    watcher = _Watcher(study, run.recipe.search.num_trials, reporter)
    try:
        with _terminable():
            if workers == 1:
                _work_here(run, study, folder, watcher)
            else:
                _work_beside(folder, workers, watcher)
    except (Cancelled, KeyboardInterrupt) as error:
        done = sum(trial.state in _ENDED for trial in study.results())
        raise Cancelled(
            f"the search stopped after {done} of {run.recipe.search.num_trials} trials; they are in "
            f"'{folder}'. Go on with --resume."
        ) from error
    return _conclude(run.recipe, study, folder, time.monotonic() - started)


def work(folder: Path) -> None:
    """Be one worker of the search in ``folder``, until all trials are taken or the parent has died."""
    recipe = build_recipe(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    run = prepare_without_test(recipe)
    study = SharedStudy(folder, recipe.search, num_validations(recipe))
    study.check_identity(_identity(run))
    parent = os.getppid()
    study.join(f"worker-{os.getpid()}")
    run_trials(run, study, folder / "scratch", lambda: os.getppid() == parent)


class _Watcher:
    """Says one line about each trial that has ended since it looked last."""

    def __init__(self, study: SharedStudy, total: int, reporter: Reporter) -> None:
        self._study = study
        self._total = total
        self._reporter = reporter
        self._seen = {t.number for t in study.results() if t.state in _ENDED}

    def look(self) -> bool:
        """Report; always True, so that it may be ``after_each``."""
        trials = self._study.results()
        ended = [trial for trial in trials if trial.state in _ENDED]
        best = _best(trials)
        for trial in ended:
            if trial.number not in self._seen:
                self._seen.add(trial.number)
                self._reporter.note(_line(trial, len(ended), self._total, best))
        return True


def _work_here(run: Prepared, study: SharedStudy, folder: Path, watcher: _Watcher) -> None:
    study.join(f"main-{os.getpid()}")
    try:
        run_trials(run, study, folder / "scratch", watcher.look)
    finally:
        study.leave()


def _work_beside(folder: Path, workers: int, watcher: _Watcher) -> None:
    """Start processes, watch them, and end them with us."""
    command = [sys.executable, "-m", "lorary.trainer.search.worker", str(folder)]
    logs = [folder / "workers" / f"{os.getpid()}-{number}.log" for number in range(workers)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for path in logs:
            with path.open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        while any(process.poll() is None for process in processes):
            time.sleep(_POLL_S)
            watcher.look()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()
    watcher.look()
    for process, path in zip(processes, logs, strict=True):
        if process.returncode:
            said = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise TrainingFailed(
                f"a worker of the search ended with exit code {process.returncode}: "
                f"{said[-1] if said else 'it said nothing'} (all of it in '{path}'). Go on with --resume."
            )


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the search as Ctrl-C does, with what it holds given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(recipe: Recipe, study: SharedStudy, folder: Path, seconds: float) -> SearchResult:
    trials = study.results()
    best = _best(trials)
    if best is None:
        notes = [trial.note for trial in trials if trial.note]
        raise TrainingFailed(
            f"none of {len(trials)} trials was trained to its end, so there is no best one"
            + (f"; the first failed with: {notes[0]}" if notes else ". Run more trials.")
        )
    result = SearchResult(
        recipe=recipe_at(recipe, best.point),
        best=best,
        trials=tuple(trials),
        importances=study.importances(),
        seconds=round(seconds, 1),
    )
    tree = recipe_dict(result.recipe)
    del tree["search"]
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    (folder / "best.yaml").write_text(text, encoding="utf-8")
    write_jsonl(folder / "trials.jsonl", [asdict(trial) for trial in trials])
    write_search_report(folder / "report.html", recipe, trials, best, result.importances)
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    return result


def _best(trials: list[TrialResult]) -> TrialResult | None:
    """Return the complete trial with the least loss, the earlier of two equal ones."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.loss is not None]
    return min(complete, key=lambda trial: (trial.loss, trial.number), default=None)


def _identity(run: Prepared) -> str:
    """Return what makes losses comparable: recipe, space, base and data, but not how many trials."""
    fixed = run_identity(run.recipe, run.base.card.fingerprint, run.splits.fingerprint)
    plain = asdict(replace(run.recipe.search, trials=0, sampler="random", pruner="none"))
    return f"{fixed} {json.dumps(plain['space'], sort_keys=True)} {run.recipe.search.sampler == 'grid'}"


def _drop(folder: Path) -> None:
    """Remove an earlier study; anything else in its place is not ours to remove.

    Raises:
        ConfigError: the folder is something else.
    """
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / DATABASE).is_file():
        raise ConfigError(
            f"'{folder}' is no study, so --force does not replace it. Choose another --study."
        )
    shutil.rmtree(folder)


def _headline(recipe: Recipe, folder: Path, workers: int) -> str:
    search_ = recipe.search
    return (
        f"{recipe.name}: {search_.num_trials} trials over {', '.join(search_.space)} "
        f"({search_.sampler}, {search_.pruner} pruner, {workers} "
        f"worker{'s' * (workers != 1)}), judged by validation loss; study in '{folder}'"
    )


def _line(trial: TrialResult, done: int, total: int, best: TrialResult | None) -> str:
    outcome = {
        "complete": f"loss {trial.loss:.4f}" if trial.loss is not None else "",
        "pruned": f"pruned after {len(trial.losses)} validations",
        "failed": f"failed: {trial.note}",
    }[trial.state]
    point = " ".join(f"{key}={shown(value)}" for key, value in trial.point.items())
    lead = f"best {best.loss:.4f} (trial {best.number})" if best else "no best yet"
    return f"trial {done}/{total} · {point} · {outcome} · {trial.seconds:.1f}s · {lead}"


def shown(value: Any) -> str:
    """Return a point's value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
