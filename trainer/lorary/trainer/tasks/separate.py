"""One adapter for each task: ordinary runs, one after the other, and then each adapter on each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.bases import find_base
from lorary.errors import AlreadyExists, InvalidRecipe, LoraryError
from lorary.registry.folder import MANIFEST_FILE, read_bytes
from lorary.registry.manifest import Manifest
from lorary.trainer import processes
from lorary.trainer.checkpoints import MARKER, run_identity
from lorary.trainer.forgetting import ForgettingTable
from lorary.trainer.measure import Exam, Subject, measure
from lorary.trainer.output import check_output
from lorary.trainer.progress import Reporter
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.report import add_forgetting
from lorary.trainer.tasks.recipe import about_task
from lorary.trainer.train import (
    Prepared,
    base_identity,
    checkpoints_of,
    dtype_of,
    prepare,
    train,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorary.trainer.tasks.recipe import TasksRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparateResult:
    """What came of it.

    Attributes:
        folders: of the adapter of each task, by the task's name.
        manifests: theirs.
        table: each adapter on each task.
    """

    folders: Mapping[str, Path]
    manifests: Mapping[str, Manifest]
    table: ForgettingTable


def train_separate(
    recipe: TasksRecipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
) -> SeparateResult:
    """Train the adapter of every task, then measure each on all tasks.

    Every run is one that ``lorary train`` would make of the task's own recipe, with its folder and checkpoints.
    The table is put into all reports when the last adapter is there.

    Args:
        recipe: with ``adapters: separate``.
        output: the folders are called as this one, with ``-`` and the task's name behind.
        resume: leave out tasks that are finished, and go on with the one that is not.
        force: replace earlier outputs; with ``resume`` only those of another recipe, base or data.
        reporter: where progress goes.

    Raises:
        AlreadyExists: a folder is there, and is not what this recipe gives.
        InvalidRecipe: nothing is there to go on from; several processes; and what ``train`` raises.
    """
    reporter = reporter or Reporter()
    if processes.num_processes() > 1:
        raise InvalidRecipe(
            "adapters: separate is trained by one process, which measures between the runs. Start it "
            "without a launcher, or give each task a recipe of its own."
        )
    folders = folders_of(recipe, output)
    base = find_base(recipe.base, progress=reporter.note)
    runs: dict[str, Prepared] = {}
    for name, one in recipe.recipes().items():
        with about_task(name):
            runs[name] = prepare(one, reporter, base)
    finished = _finished(runs, folders, force=force) if resume else {}
    for name in runs:
        if name not in finished:
            check_output(folders[name], force=force)
    begun = {name for name in runs if _has_checkpoint(folders[name])} if resume else set()
    if resume and not finished and not begun:
        raise InvalidRecipe(
            f"--resume was given, but no task of '{recipe.name}' is finished or has a whole checkpoint. "
            "Run without --resume."
        )
    manifests: dict[str, Manifest] = {}
    for name, run in runs.items():
        if name in finished:
            reporter.note(f"{name}: finished before, in '{folders[name]}'")
            manifests[name] = finished[name]
            continue
        with about_task(name):
            manifests[name] = train(
                run.recipe,
                folders[name],
                resume=name in begun,
                force=force,
                reporter=reporter,
                origin={"tasks": {"recipe": recipe.name, "task": name, "of": [*runs]}},
            )
    table = _measure(runs, folders, manifests, reporter)
    for folder in folders.values():
        add_forgetting(folder / "report", table)
    return SeparateResult(folders=folders, manifests=manifests, table=table)


def folders_of(recipe: TasksRecipe, output: Path) -> dict[str, Path]:
    """Return where the adapter of each task goes."""
    return {name: output.with_name(f"{output.name}-{name}") for name in recipe.tasks}


def _finished(
    runs: Mapping[str, Prepared], folders: Mapping[str, Path], *, force: bool
) -> dict[str, Manifest]:
    """Return the manifests of the tasks whose folder is what their run would make."""
    found = {}
    for name, run in runs.items():
        path = folders[name] / MANIFEST_FILE
        if not folders[name].exists():
            continue
        manifest = Manifest.from_json(read_bytes(path)) if path.is_file() else None
        if manifest is not None and _identity_of(manifest) == run.identity:
            found[name] = manifest
        elif not force:
            raise AlreadyExists(
                f"'{folders[name]}' exists and is not what task '{name}' gives now: the recipe, the base or "
                "the data is another. Undo the change, choose another --output, or add --force to "
                "train it anew."
            )
    return found


def _identity_of(manifest: Manifest) -> str | None:
    """Return the identity of the run that wrote a manifest; ``None`` if this Lorary cannot read its recipe."""
    tree, facts = manifest.training.get("recipe"), manifest.training
    plan: dict[str, Any] = {
        key: facts[key] for key in ("quantization_plan",) if facts.get(key) is not None
    }
    try:
        recipe = build_recipe(tree) if isinstance(tree, dict) else None
    except LoraryError:
        return None
    if recipe is None:
        return None
    return run_identity(
        recipe,
        base_identity(manifest.base.fingerprint, plan),
        str(manifest.data.get("fingerprint")),
        int(facts.get("num_processes", 1)),
    )


def _has_checkpoint(folder: Path) -> bool:
    return any(checkpoints_of(folder).glob(f"checkpoint-*/{MARKER}"))


def _measure(
    runs: Mapping[str, Prepared],
    folders: Mapping[str, Path],
    manifests: Mapping[str, Manifest],
    reporter: Reporter,
) -> ForgettingTable:
    """Let every adapter take every task's held-out examples, over one base that is loaded once."""
    first = next(iter(runs.values()))
    subjects = [
        Subject(ref=run.recipe.name, folder=folders[name], manifest=manifests[name])
        for name, run in runs.items()
    ]
    exams = [
        Exam(name=name, recipe=run.recipe, examples=run.splits.test) for name, run in runs.items()
    ]
    results = measure(
        subjects,
        exams,
        base=first.base,
        quantization=first.kind.formats,
        dtype=dtype_of(first.recipe),
        device=first.recipe.training.device,
        seed=first.recipe.training.seed,
        reporter=reporter,
    )
    return ForgettingTable.of(
        first.base.name, ((one.adapter, one.exam, one.metrics) for one in results)
    )
