"""The trials of one search: an Optuna study in one SQLite file that any number of processes share.

Who wants work takes the folder's lock, counts what is taken, and draws one point: so the number of
trials is exact however many workers there are, and two of a grid's never take the same point. The
sampler is made anew for every trial, from the seed and the number of trials taken before, so that a
search that was killed and resumed draws what it would have drawn, if one worker did it all.

Every worker holds a lock on a file of its own. A trial whose worker's lock can be had is dead; its point
goes back into the queue. A trial's state in Optuna:

=========  ==========================================================================
COMPLETE   trained to its end; the value is its least validation loss
PRUNED     stopped by the pruner, diverged, or no recipe at all (attribute ``note``)
FAIL       its worker died
=========  ==========================================================================

Papers: TPE, Bergstra et al. 2011; median stopping, Golovin et al. 2017 (Vizier), §3.2; Hyperband, Li et
al. 2018; all of them Optuna's.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from lorary.errors import AlreadyExists, CorruptArtifact, IncompatibleAdapter, InvalidRecipe
from lorary.trainer.search.points import is_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import TextIOWrapper
    from pathlib import Path

    from lorary.trainer.search.space import Dimension, SearchRecipe

DATABASE = "study.sqlite"
_NAME = "search"
# SQLite lets one process write at a time; the others wait this long for it.
_BUSY_TIMEOUT_S = 120

State = Literal["complete", "pruned", "failed", "running", "waiting", "died"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """One trial, for people and reports.

    Attributes:
        point: the recipe keys it was run with.
        losses: its validation losses in order.
        loss: the least of them; None if it ended before there was one, or diverged.
        note: why it failed; empty otherwise.
        worker: who ran it.
    """

    number: int
    state: State
    point: dict[str, Any]
    losses: tuple[float, ...]
    loss: float | None
    seconds: float
    note: str
    worker: str


class SharedStudy:
    """The study in a folder, and what one process does with it.

    Args:
        folder: made by ``create``.
        recipe: the search section; its space decides what is drawn.
        num_validations: most validation losses of a trial.

    Raises:
        InvalidRecipe: there is no study in the folder.
        CorruptArtifact: its file is damaged.
    """

    def __init__(self, folder: Path, recipe: SearchRecipe, num_validations: int) -> None:
        self._folder = folder
        self._recipe = recipe
        self._distributions = {one.key: _distribution(one) for one in recipe.dimensions}
        if not (folder / DATABASE).is_file():
            raise InvalidRecipe(
                f"--resume was given, but '{folder}' holds no study. Run without --resume."
            )
        try:
            self._study = optuna.load_study(
                study_name=_NAME,
                storage=_storage(folder),
                pruner=_pruner(recipe, num_validations),
            )
        except (SQLAlchemyError, optuna.exceptions.OptunaError, KeyError) as error:
            raise CorruptArtifact(
                f"the study in '{folder / DATABASE}' cannot be read: {error}. Start anew with --force."
            ) from error
        self._worker = ""
        self._held: TextIOWrapper | None = None

    @property
    def raw(self) -> optuna.Study:
        """Optuna's own view of it."""
        return self._study

    def check_identity(self, identity: str) -> None:
        """Refuse a study of another recipe, base or data.

        Raises:
            IncompatibleAdapter: it is one.
        """
        if self._study.user_attrs.get("identity") != identity:
            raise IncompatibleAdapter(
                f"the study in '{self._folder}' is of another recipe, space, base or data, so its losses "
                "cannot be compared with new ones. Undo the change, or start anew with --force."
            )

    def join(self, worker: str) -> None:
        """Become a worker, until ``leave`` or the end of the process."""
        name = f"{worker}-{secrets.token_hex(4)}"
        self._held = (self._folder / "workers" / f"{name}.lock").open("w")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        self._worker = name

    def leave(self) -> None:
        """Give the worker's lock back."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def ask(self) -> tuple[Trial, dict[str, Any]] | None:
        """Take the next trial with its point; None when all are taken."""
        with _locked(self._folder / "ask.lock"):
            self._bury_dead()
            trials = self._study.get_trials(deepcopy=False)
            taken = sum(t.state not in (TrialState.WAITING, TrialState.FAIL) for t in trials)
            if taken >= self._recipe.num_trials:
                return None
            self._study.sampler = _sampler(self._recipe, taken)
            trial = self._study.ask(self._distributions)
            trial.set_user_attr("worker", self._worker)
        return trial, {key: _decoded(value) for key, value in trial.params.items()}

    def tell(self, trial: Trial, loss: float) -> None:
        """End a trial that was trained to its end."""
        self._study.tell(trial, loss)

    def drop(self, trial: Trial, note: str = "") -> None:
        """End a trial early: the pruner's decision, or, with a note, one that failed."""
        if note:
            trial.set_user_attr("note", note)
        self._study.tell(trial, state=TrialState.PRUNED)

    def results(self) -> list[TrialResult]:
        """Return all trials in order, those that died left out."""
        trials = self._study.get_trials(deepcopy=False)
        return [_result(trial) for trial in trials if trial.state != TrialState.FAIL]

    def importances(self) -> dict[str, float]:
        """Return each key's share in how trials differ, the largest first; empty if too few ended.

        PED-ANOVA (Watanabe et al. 2023): how much the values of the better trials differ from all.
        """
        done = [t for t in self._study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        varied = [
            key for key in self._distributions if len({_key(t.params[key]) for t in done}) > 1
        ]
        if len(done) < 2 or not varied or len({trial.value for trial in done}) < 2:
            return {}
        found = optuna.importance.get_param_importances(self._study, params=varied)
        return {key: float(value) for key, value in found.items()}

    def _bury_dead(self) -> None:
        """Put the points of dead workers' trials back into the queue; the folder's lock is held."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker", "")
            # One without a worker was killed while it was taken, for who takes one holds the lock.
            if worker and (worker == self._worker or self._is_alive(worker)):
                continue
            self._study.tell(trial.number, state=TrialState.FAIL)
            # Without all its values it was killed while they were drawn; they are drawn again.
            if set(trial.params) == set(self._distributions):
                self._study.enqueue_trial(trial.params)

    def _is_alive(self, worker: str) -> bool:
        try:
            with (self._folder / "workers" / f"{worker}.lock").open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False


def create_study(folder: Path, recipe: SearchRecipe, identity: str) -> None:
    """Make the folder and an empty study in it; a grid's points are queued at once.

    Raises:
        AlreadyExists: there is a study.
    """
    if (folder / DATABASE).exists():
        raise AlreadyExists(
            f"'{folder}' holds a study already. Go on with it with --resume, or drop it with --force."
        )
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(study_name=_NAME, storage=_storage(folder), direction="minimize")
    study.set_user_attr("identity", identity)
    if recipe.sampler == "grid":
        keys = [one.key for one in recipe.dimensions]
        for values in itertools.product(*(one.choices for one in recipe.dimensions)):
            study.enqueue_trial(dict(zip(keys, map(_encoded, values), strict=True)))


def _storage(folder: Path) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages.RDBStorage(
        f"sqlite:///{(folder / DATABASE).resolve()}",
        engine_kwargs={"connect_args": {"timeout": _BUSY_TIMEOUT_S}},
    )


def _sampler(recipe: SearchRecipe, index: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of the trial with this many before it."""
    seed = (recipe.seed + 1_000_003 * index) % 2**32
    if recipe.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=recipe.startup_trials)
    # A grid's points are queued, so that nothing is drawn.
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(recipe: SearchRecipe, num_validations: int) -> optuna.pruners.BasePruner:
    """Return the pruner; its steps are a trial's validations, counted from 1."""
    if recipe.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=recipe.startup_trials)
    if recipe.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=1, max_resource=max(1, num_validations), reduction_factor=3
        )
    return optuna.pruners.NopPruner()


def _distribution(one: Dimension) -> BaseDistribution:
    if one.choices:
        return CategoricalDistribution([_encoded(value) for value in one.choices])
    if is_whole(one):
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)


def _encoded(value: Any) -> Any:
    """Return a choice as Optuna can keep it: lists become marked JSON."""
    return f"json:{json.dumps(value)}" if isinstance(value, (list, dict)) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("json:"):
        return json.loads(value.removeprefix("json:"))
    return value


def _key(value: Any) -> str:
    return repr(value)


def _result(trial: FrozenTrial) -> TrialResult:
    note = str(trial.user_attrs.get("note", ""))
    states: Mapping[TrialState, State] = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "failed" if note else "pruned",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting",
        TrialState.FAIL: "died",
    }
    steps = sorted(trial.intermediate_values)
    # A failed trial was told infinite, for the sampler alone.
    losses = tuple(v for step in steps if math.isfinite(v := trial.intermediate_values[step]))
    duration = trial.duration
    return TrialResult(
        number=trial.number,
        state=states[trial.state],
        point={key: _decoded(value) for key, value in trial.params.items()},
        losses=losses,
        loss=None if note or not losses else min(losses),
        seconds=round(duration.total_seconds(), 2) if duration else 0.0,
        note=note,
        worker=str(trial.user_attrs.get("worker", "")),
    )


@contextmanager
def _locked(path: Path) -> Iterator[TextIOWrapper]:
    """Hold an exclusive lock on a file, over processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
