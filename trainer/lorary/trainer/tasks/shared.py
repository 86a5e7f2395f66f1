"""One adapter for several tasks: a run whose rows are those of all, and which is measured on each."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from lorary.bases import find_base
from lorary.errors import InvalidRecipe
from lorary.registry.manifest import Task
from lorary.trainer import processes
from lorary.trainer.checkpoints import run_identity
from lorary.trainer.data import Splits
from lorary.trainer.examples import Example
from lorary.trainer.progress import Reporter
from lorary.trainer.quantplan.use import plan_facts
from lorary.trainer.recipe_file import recipe_dict
from lorary.trainer.tasks.mix import MixedRows, shares_of
from lorary.trainer.tasks.recipe import TasksRecipe, about_task
from lorary.trainer.train import Prepared, base_identity, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRun(Prepared):
    """A run over the rows of several tasks.

    Method, schedule and kind are the same for all, so ``recipe`` and ``kind`` are the first task's, and only
    what they have in common is asked of them; each task's own are in ``parts_by_name``.

    Attributes:
        whole: the recipe, with no ``auto`` left in it.
        parts_by_name: the run of each task.
    """

    whole: TasksRecipe
    parts_by_name: Mapping[str, Prepared]

    @property
    def mix(self) -> MixedRows:
        """The rows with their shares."""
        assert isinstance(self.train_rows, MixedRows)
        return self.train_rows

    @property
    def identity(self) -> str:
        """What a checkpoint must match to be resumed."""
        return run_identity(
            self.whole,
            base_identity(self.base.card.fingerprint, plan_facts(self.kind.formats)),
            self.data_fingerprint,
            processes.num_processes(),
        )

    @property
    def parts(self) -> Mapping[str, Prepared]:
        """The run of each task by its name."""
        return self.parts_by_name

    @property
    def task(self) -> Task:
        """What all tasks have in common."""
        return common_task([*self.tasks.values()])

    @property
    def tasks(self) -> dict[str, Task]:
        """Every task with its own template, by name."""
        return {name: part.task for name, part in self.parts_by_name.items()}

    @property
    def data_fingerprint(self) -> str:
        """``sha256:`` over the fingerprints of the tasks' data."""
        prints = [f"{name} {part.data_fingerprint}\n" for name, part in self.parts_by_name.items()]
        return f"sha256:{hashlib.sha256(''.join(prints).encode()).hexdigest()}"

    def data_facts(self) -> dict[str, Any]:
        """Return counts over all tasks, and what there is to say of each."""
        each = {name: part.data_facts() for name, part in self.parts_by_name.items()}
        counts = [key for key in next(iter(each.values())) if key.startswith("num_")]
        return {
            "source": ", ".join(dict.fromkeys(str(facts["source"]) for facts in each.values())),
            "fingerprint": self.data_fingerprint,
            **{key: sum(facts[key] for facts in each.values()) for key in counts},
            "tasks": {
                name: facts | {"share": round(self.mix.shares[name], 4)}
                for name, facts in each.items()
            },
        }

    def recorded(self) -> dict[str, Any]:
        """Return the recipe as the manifest has it."""
        return recipe_dict(self.whole)


def prepare_shared(recipe: TasksRecipe, reporter: Reporter | None = None) -> SharedRun:
    """Prepare every task over one base, and mix their rows; raises what ``prepare`` raises, naming the task.

    Raises:
        InvalidRecipe: the tasks are for an adapter each.
    """
    if recipe.adapters != "shared":
        raise InvalidRecipe(
            f"recipe '{recipe.name}' is for separate adapters, each of which has a run of its own; use "
            "lorary train, or set adapters: shared."
        )
    base = find_base(recipe.base, progress=(reporter or Reporter(quiet=True)).note)
    parts = {}
    for name, one in recipe.recipes().items():
        with about_task(name):
            parts[name] = prepare(one, reporter, base)
    first = next(iter(parts.values()))
    sizes = {name: len(part.train_rows) for name, part in parts.items()}
    weights = {name: entry.weight for name, entry in recipe.tasks.items()}
    rows = MixedRows(
        tasks={name: part.train_rows for name, part in parts.items()},
        shares=shares_of(sizes, weights, recipe.temperature),
    )
    resolved = {
        name: replace(entry, task=parts[name].recipe.task, data=parts[name].recipe.data)
        for name, entry in recipe.tasks.items()
    }
    return SharedRun(
        recipe=first.recipe,
        base=base,
        tokenizer=first.tokenizer,
        builder=first.builder,
        kind=first.kind,
        splits=_joined([part.splits for part in parts.values()]),
        train_rows=rows,
        validation_rows=[row for part in parts.values() for row in part.validation_rows],
        num_too_long=sum(part.num_too_long for part in parts.values()),
        whole=replace(recipe, tasks=resolved, training=first.recipe.training),
        parts_by_name=parts,
    )


def common_task(tasks: Sequence[Task]) -> Task:
    """Return the task of an adapter for several: what all agree on.

    A template that is not everybody's is nobody's: a caller who sends plain text to it would be answered as one
    of the tasks, and not know which. Without one, servers ask for the whole prompt.
    """
    first = tasks[0]
    is_one_kind = all((one.kind, one.labels) == (first.kind, first.labels) for one in tasks)
    has_one_template = all(one.template == first.template for one in tasks)
    return Task(
        kind=first.kind if is_one_kind else "generation",
        template=first.template if has_one_template else None,
        labels=first.labels if is_one_kind else (),
        max_new_tokens=max(one.max_new_tokens for one in tasks),
        stop=first.stop if all(one.stop == first.stop for one in tasks) else (),
    )


def _joined(splits: Sequence[Splits]) -> Splits:
    return Splits(
        train=_Chained([one.train for one in splits]),
        validation=tuple(chain.from_iterable(one.validation for one in splits)),
        test=tuple(chain.from_iterable(one.test for one in splits)),
        num_duplicates=sum(one.num_duplicates for one in splits),
    )


class _Chained(Collection[Example]):
    """Several collections, one after the other."""

    def __init__(self, parts: Sequence[Collection[Example]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[Example]:
        return chain.from_iterable(self._parts)

    def __contains__(self, example: object) -> bool:
        return any(example in part for part in self._parts)
