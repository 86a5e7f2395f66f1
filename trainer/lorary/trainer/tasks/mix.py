"""Rows of several tasks in one run: what share each gets, and which batch is whose.

A batch holds rows of one task, as in MT-DNN (Liu et al., arXiv 1901.11504, algorithm 1), so that it is padded little
and every task's batches are those of a run of its own. Whose the next batch is, is decided by shares: Webster's method,
which hands out seats, keeps every task within about one batch of its share at any moment, and draws nothing at random.

Shares by size, with a temperature: Raffel et al. (T5, arXiv 1910.10683, section 3.5.2).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from lorary.trainer.batches import plan_batches
from lorary.trainer.token_store import row_lengths


def shares_of(
    sizes: Mapping[str, int], weights: Mapping[str, float], temperature: float
) -> dict[str, float]:
    """Return each task's share of the batches; they add up to 1.

    Args:
        sizes: training rows of each task, n.
        weights: of each task; where they are 0 the share is proportional to n^(1/temperature).
        temperature: above 0; 1 is by size, more is flatter.
    """
    given = {name: weights[name] or size ** (1 / temperature) for name, size in sizes.items()}
    total = sum(given.values())
    return {name: value / total for name, value in given.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows(Sequence[Any]):
    """The training rows of all tasks, one after the other, and in which mixture they are trained on.

    Attributes:
        tasks: the rows of each, by name.
        shares: of the batches, by name; above 0.
    """

    tasks: Mapping[str, Sequence[Any]]
    shares: Mapping[str, float]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [length for rows in self.tasks.values() for length in row_lengths(rows)]

    def __len__(self) -> int:
        return sum(map(len, self.tasks.values()))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        for rows in self.tasks.values():
            if 0 <= index < len(rows):
                return rows[index]
            index -= len(rows)
        raise IndexError(f"no row {index}")

    def plan(self, *, batch_size: int, num_batches: int, seed: int) -> list[list[int]]:
        """Return row indices of each batch, a function of the arguments; more batches begin with the same ones.

        Within a task every row comes once per pass over its rows.
        """
        turns = list(itertools.islice(take_turns(self.shares), num_batches))
        batches: dict[str, Iterator[list[int]]] = {}
        start = 0
        for name, rows in self.tasks.items():
            own = plan_batches(
                row_lengths(rows),
                batch_size=batch_size,
                num_batches=turns.count(name),
                seed=seed,
            )
            batches[name] = iter([[start + i for i in batch] for batch in own])
            start += len(rows)
        return [next(batches[name]) for name in turns]


def take_turns(shares: Mapping[str, float]) -> Iterator[str]:
    """Yield names without end, each as often as its share, by Webster's method; ties go to the first."""
    taken = dict.fromkeys(shares, 0)
    while True:
        name = min(shares, key=lambda one: (taken[one] + 0.5) / shares[one])
        taken[name] += 1
        yield name
