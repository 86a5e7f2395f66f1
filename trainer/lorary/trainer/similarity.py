"""Which texts look alike: word sets, their Jaccard index, and a search of a few among many."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def words_of(text: str) -> frozenset[str]:
    """Return the lower-case words of a text, for comparing texts."""
    return frozenset(re.findall(r"\w+", text.lower()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return shared words over all words; 0 when both are empty."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0


class Lookalikes:
    """Finds which of a few texts share more than a word-Jaccard of ``threshold`` with a given one.

    Each word knows the texts it is in, so what a given text shares with all of them is one count over the lists of its
    words. (A prefix filter compares fewer pairs where words are rare, but long texts share common words, and then
    it compares nearly all, set by set.)
    """

    def __init__(self, words: Sequence[frozenset[str]], threshold: float) -> None:
        self._threshold = threshold
        self._sizes = np.array([len(one) for one in words], dtype=np.int64)
        where: dict[str, list[int]] = {}
        for i, one in enumerate(words):
            for word in one:
                where.setdefault(word, []).append(i)
        self._where = {word: np.array(found, dtype=np.int32) for word, found in where.items()}

    def of(self, words: frozenset[str]) -> list[int]:
        """Return the indices of those that look like ``words``; itself too, if it is one of them."""
        met = [self._where[word] for word in words if word in self._where]
        if not met:
            return []
        shared = np.bincount(np.concatenate(met), minlength=len(self._sizes))
        alike = shared / (self._sizes + len(words) - shared) > self._threshold
        found: list[int] = np.flatnonzero(alike).tolist()
        return found
