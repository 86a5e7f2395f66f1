"""Which rows form which batch, decided for the whole run before it starts.

Rows of like length share a batch, so little is padded; the order of batches is shuffled. Because the
plan is a function of lengths and seed alone, a resumed run simply skips the batches already done.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.trainer.data import Row

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


def collate(rows: Sequence[Row], pad_token_id: int) -> dict[str, Any]:
    """Pad rows on the right and mask what is not learned.

    Causal attention never looks right, so padding needs no attention mask; its labels are ignored.

    Returns:
        ``input_ids`` and ``labels``, both int64 [B, T]; labels are not shifted.
    """
    import torch

    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        input_ids[i, : len(ids)] = ids
        labels[i, row.num_prompt : len(ids)] = ids[row.num_prompt :]
    return {"input_ids": input_ids, "labels": labels}
