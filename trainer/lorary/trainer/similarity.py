"""Which texts look alike: word sets, their Jaccard index, and a search that compares few pairs."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

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

    Whatever total order words have: two sets with a Jaccard above t share one of the first ``(1 - t)`` words
    of each (the prefix filter of Chaudhuri et al., *A Primitive Operator for Similarity Joins*, ICDE
    2006, section 4), so only texts that meet in such a word are compared. The order here puts what is
    rare in the few first; words that none of them has come before all others.
    """

    def __init__(self, words: Sequence[frozenset[str]], threshold: float) -> None:
        self._words = words
        self._threshold = threshold
        self._counts = Counter(word for one in words for word in one)
        self._where: dict[str, list[int]] = {}
        for i, one in enumerate(words):
            for word in self._rarest(one):
                self._where.setdefault(word, []).append(i)

    def of(self, words: frozenset[str]) -> list[int]:
        """Return the indices of those that look like ``words``; itself too, if it is one of them."""
        met = {i for word in self._rarest(words) for i in self._where.get(word, ())}
        return [i for i in sorted(met) if jaccard(words, self._words[i]) > self._threshold]

    def _rarest(self, words: frozenset[str]) -> list[str]:
        ordered = sorted(words, key=lambda word: (self._counts[word], word))
        return ordered[: len(words) - int(self._threshold * len(words)) + 1]
