"""From the hidden states of a prompt to one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lorary.server.engine.request import Pooling
    from lorary.server.engine.sequence import Sequence


class Pool:
    """What a prompt's hidden states have come to so far; engine thread only.

    Summed in float64, so that a vector does not depend on how its prompt was cut into chunks.

    Attributes:
        num_pooled: positions that are in it, the first ones of the prompt.
    """

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum: torch.Tensor | None = None
        self.num_pooled = 0

    def wanted(self, sequence: Sequence, start: int, stop: int) -> range:
        """Return which of the positions [start, stop) of a prompt, about to be read, it needs.

        Whoever lost its place begins to read anew, and what is in the pool already stays there.
        """
        if self._pooling.kind == "last":
            return range(sequence.num_prompt - 1, stop)
        return range(max(start, self.num_pooled), stop)

    def add(self, hidden: torch.Tensor) -> None:
        """Take in the hidden states float32 [N, width] of the N positions that were wanted."""
        total = hidden.double().sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self.num_pooled += len(hidden)

    def vector(self) -> tuple[float, ...]:
        """Return the vector, of float32 numbers; asked once the prompt has been read.

        Semantics: v = (sum over positions of hidden) / count, its first ``dimensions`` components, divided
        by their length if ``is_normalized``. A vector of zeros has no direction and stays what it is.
        """
        assert self._sum is not None, "a pool without hidden states"
        vector = self._sum / self.num_pooled
        if self._pooling.dimensions:
            vector = vector[: self._pooling.dimensions]
        if self._pooling.is_normalized:
            vector = torch.nn.functional.normalize(vector, dim=0)
        return tuple(vector.float().tolist())
