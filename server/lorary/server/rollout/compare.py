"""How far two answers to the same call are apart."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SAME_DIRECTION = 1e-6
"""Divergence of vectors that differ by float32's rounding alone."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How two answers differ.

    Attributes:
        first: position of the first token that differs; -1 when none does.
        divergence: 0 for the same answer, 1 for nothing in common.
    """

    first: int
    divergence: float


def compare_tokens(ours: Sequence[int], theirs: Sequence[int]) -> Difference:
    """Compare two generated answers.

    After the first difference the two follow different beginnings and their tokens say nothing more, so
    what counts is how far they went together.

    Semantics: divergence = 1 - first / max(len(ours), len(theirs))
    """
    longest = max(len(ours), len(theirs))
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    if same == longest:
        return Difference(-1, 0.0)
    return Difference(same, 1.0 - same / longest)


def compare_labels(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Difference:
    """Compare the log probabilities of two classifications, by label.

    Semantics: divergence = 1/2 * sum over labels of abs(p - q), the total variation distance, where p
    and q are the log probabilities' softmax; a label that one side lacks has probability 0 there.
    """
    p, q = _softmax(ours), _softmax(theirs)
    distance = sum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in p.keys() | q.keys()) / 2
    is_same_label = max(p, key=p.__getitem__) == max(q, key=q.__getitem__)
    return Difference(-1 if is_same_label else 0, min(1.0, distance))


def compare_vectors(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compare two embeddings of one input, by their directions.

    Semantics: divergence = (1 - cos(ours, theirs)) / 2, where a vector of zeros has cosine 0 with any other; as
    good as the same below ``SAME_DIRECTION``.
    """
    lengths = math.hypot(*ours) * math.hypot(*theirs)
    cosine = sum(map(operator.mul, ours, theirs)) / lengths if lengths else float(ours == theirs)
    divergence = min(1.0, max(0.0, (1.0 - cosine) / 2))
    return Difference(-1 if divergence < SAME_DIRECTION else 0, divergence)


def _softmax(logprobs: Mapping[str, float]) -> dict[str, float]:
    best = max(logprobs.values())
    weights = {label: math.exp(value - best) for label, value in logprobs.items()}
    total = sum(weights.values())
    return {label: weight / total for label, weight in weights.items()}
