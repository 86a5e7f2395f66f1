"""Several samples in one row, so that nothing is padded, and none of them sees another.

A packed row's position ids begin anew with each sample. transformers' masks read that as the border of a
sample (``masking_utils.find_packed_sequence_indices``) and allow attention within one only, in every attention we train with
(``sdpa``, ``eager`` and ``lorary_grouped``, all of which take the mask as it is). A model that makes its masks, or its
positions, in another way would let samples leak into each other in silence, so ``check_isolation`` asks the model itself,
before any step.

Attention costs the square of a row, of which a packed row computes all and uses the blocks on the diagonal.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, overload

from lorary.errors import InvalidRecipe
from lorary.trainer.encoding import Row
from lorary.trainer.token_store import row_lengths

# Samples are packed out of pools of this many, shuffled: enough to fill rows to the brim.
_POOL = 4096


class PackedRows(Sequence[Row]):
    """Rows of at most ``max_length`` tokens, of several samples each; every sample is in one of them.

    Args:
        samples: of at most ``max_length`` tokens; read when a row is.
        max_length: tokens of a row.
        seed: which samples share a row is drawn once, so an order of these rows is a function of it.
    """

    def __init__(self, samples: Sequence[Row], *, max_length: int, seed: int) -> None:
        self._samples = samples
        sizes = row_lengths(samples)
        self._packs = plan_packs(sizes, max_length=max_length, seed=seed)
        self.lengths = [sum(sizes[i] for i in pack) for pack in self._packs]
        """Tokens of each row."""

    def __len__(self) -> int:
        return len(self._packs)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return join([self._samples[i] for i in self._packs[index]])


def plan_packs(lengths: Sequence[int], *, max_length: int, seed: int) -> list[list[int]]:
    """Return which samples form each row, by best fit decreasing: the longest first, where least room is left."""
    order = list(range(len(lengths)))
    random.Random(f"pack/{seed}").shuffle(order)
    packs: list[list[int]] = []
    for start in range(0, len(order), _POOL):
        room: list[tuple[int, int]] = []  # (tokens left, row), ascending
        for sample in sorted(order[start : start + _POOL], key=lambda i: -lengths[i]):
            place = bisect_left(room, (lengths[sample], -1))
            if place < len(room):
                left, pack = room.pop(place)
            else:
                left, pack = max_length, len(packs)
                packs.append([])
            packs[pack].append(sample)
            insort(room, (left - lengths[sample], pack))
    return packs


def join(samples: Sequence[Row]) -> Row:
    """Return samples as one row. The first token of each is read: what comes before it is another sample."""
    ends = list(accumulate(len(sample.input_ids) for sample in samples))
    unlearned: list[tuple[int, int]] = []
    for start, sample in zip([0, *ends], samples, strict=False):
        if start:
            unlearned.append((start, start + sample.num_prompt))
        unlearned += [(start + a, start + b) for a, b in sample.unlearned]
    return Row(
        input_ids=tuple(token for sample in samples for token in sample.input_ids),
        num_prompt=samples[0].num_prompt,
        unlearned=tuple(unlearned),
        starts=tuple(ends[:-1]),
    )


def check_isolation(model: Any) -> None:
    """Ask the model whether a sample in a packed row is what it is alone.

    Raises:
        InvalidRecipe: another sample in its row changes it.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    samples = [[(7 * i + j) % vocabulary for i in range(6)] for j in (1, 3)]
    ids = torch.tensor([[*samples[0], *samples[1]]], device=model.device)
    positions = torch.tensor([[*range(6), *range(6)]], device=model.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 6:]
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits[0]
        leaked = model(input_ids=ids, use_cache=False).logits[0, 6:]
    model.train(was_training)
    # Rounding differs with the shape of a product; what a neighbour does is far more than that.
    error = (packed - alone).float().norm()
    scale = (leaked - alone).float().norm()
    if not error <= 0.1 * scale:
        raise InvalidRecipe(
            f"training.packing: samples in one row would see each other in this base "
            f"({model.config.model_type}): its attention does not follow position ids. Set "
            "training.packing=false; rows of like length still share a batch."
        )
