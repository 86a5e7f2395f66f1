"""Which rows form which batch, decided for the whole run before it starts.

Rows of like length share a batch, so little is padded; the order of batches is shuffled. Because the
plan is a function of lengths and seed alone, a resumed run simply skips the batches already done.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lorary.trainer.token_store import row_lengths

if TYPE_CHECKING:
    from torch import Tensor

    from lorary.trainer.encoding import Row
    from lorary.trainer.kinds.kind import TokenRow

IGNORED = -100
# Rows are shuffled, cut into pools of this many batches, and sorted by length within a pool: large
# enough to pad little, small enough that a batch is not always the same rows.
_POOL_BATCHES = 50


def plan_batches(
    lengths: Sequence[int], *, batch_size: int, num_batches: int, seed: int
) -> list[list[int]]:
    """Return row indices of each batch; every row comes once per pass over the data.

    A pass ends with a smaller batch where the rows do not divide evenly.
    """
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < num_batches:
        rng = random.Random(f"{seed}/{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), batch_size * _POOL_BATCHES):
            pool = sorted(
                order[start : start + batch_size * _POOL_BATCHES], key=lambda i: -lengths[i]
            )
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        plan += batches
        epoch += 1
    return plan[:num_batches]


def plan_rows(
    rows: Sequence[TokenRow], *, batch_size: int, num_batches: int, seed: int
) -> list[list[int]]:
    """Return what ``plan_batches`` does; rows of several tasks (``tasks.mix``) have a plan of their own."""
    plan = getattr(rows, "plan", None)
    if plan is not None:
        found: list[list[int]] = plan(batch_size=batch_size, num_batches=num_batches, seed=seed)
        return found
    return plan_batches(
        row_lengths(rows), batch_size=batch_size, num_batches=num_batches, seed=seed
    )


T = TypeVar("T")


class PlannedRows(Sequence[list[T]]):
    """The planned batches as a data set, whose rows are read when their turn comes."""

    def __init__(self, rows: Sequence[T], plan: Sequence[Sequence[int]]) -> None:
        self._rows = rows
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: Any) -> Any:
        return [self._rows[i] for i in self._plan[index]]


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Any]:
    """Pad rows on the right and mask what is not learned.

    Causal attention never looks right, so padding needs no attention mask; its labels are ignored.

    Returns:
        ``input_ids`` and ``labels``, both int64 [B, T]; labels are not shifted. Of packed rows also
        ``position_ids``, which begin anew with each sample; the padding is one more of which nothing is learned.
    """
    import torch

    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        input_ids[i, : len(ids)] = ids
        labels[i, row.num_prompt : len(ids)] = ids[row.num_prompt :]
        for start, end in row.unlearned:
            labels[i, start:end] = IGNORED
    batch = {"input_ids": input_ids, "labels": labels}
    if any(row.starts for row in rows):
        batch["position_ids"] = torch.stack([_positions(row, longest) for row in rows])
    return batch


def _positions(row: Row, length: int) -> Tensor:
    """Return int64 [length], counted from 0 in each sample and in the padding."""
    import torch

    bounds = [0, *row.starts, len(row.input_ids), length]
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])
