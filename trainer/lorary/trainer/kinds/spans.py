"""Spans of words from B-, I- and O tags, and how well two taggings agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorary.trainer.bootstrap import Sums

if TYPE_CHECKING:
    from collections.abc import Sequence


def are_span_tags(labels: Sequence[str]) -> bool:
    """Whether a label set marks spans: ``O`` and ``B-``/``I-`` tags, nothing else."""
    return "O" in labels and all(label == "O" or label[:2] in ("B-", "I-") for label in labels)


def spans_of(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return (first word, one past the last, type) of each span.

    As the CoNLL scorer reads them: an ``I-`` tag after another type, or after ``O``, begins a span.
    """
    found = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-")
        if kind and (prefix != "I" or own != kind):
            found.add((start, i, kind))
            kind = ""
        if prefix in ("B", "I") and not kind:
            start, kind = i, own
    return found


def span_sums(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Sums:
    """Return 2 tp / (2 tp + fp + fn) over whole spans, all types together; 1 when there are none."""
    parts = np.zeros((len(references), 2))
    for i, (guessed, wanted) in enumerate(zip(predictions, references, strict=True)):
        a, b = spans_of(guessed), spans_of(wanted)
        parts[i] = 2 * len(a & b), len(a) + len(b)
    return Sums(
        parts=parts,
        figure=lambda sums: np.where(sums[:, 1] > 0, sums[:, 0] / np.maximum(sums[:, 1], 1), 1.0),
    )
