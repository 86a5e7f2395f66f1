"""Which examples are held out, found in passes over data that need not fit in memory.

The first pass keeps 20 bytes of every example: the hash that ranks it (equal texts have equal hashes, so
duplicates show) and its label. The examples ranked first are candidates; a second pass collects them and
a third compares every other example with them, for only one unlike all others may be held out. If too
few are, there are twice as many candidates and two more passes. Memory: about 50 bytes an example, and the
candidates' texts.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorary.errors import InvalidRecipe
from lorary.trainer.similarity import Lookalikes, words_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lorary.trainer.examples import Example
    from lorary.trainer.recipe import DataRecipe

    Indices = NDArray[np.int64]

HELD_OUT = ("test", "validation")
_CANDIDATES = 2  # of each that is wanted, at first


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdout:
    """Positions of examples in the order they are read; each part in the order of its hashes.

    Attributes:
        train: int64 [N], everything that is neither held out nor a duplicate.
        held: the examples of ``test`` and ``validation``.
        num_duplicates: examples whose text was read before.
    """

    train: Indices
    held: Mapping[str, tuple[Example, ...]]
    num_duplicates: int


def hold_out(
    read: Callable[[], Iterator[Example]], data: DataRecipe, labels: Sequence[str]
) -> Holdout:
    """Decide which examples are held out.

    Args:
        read: begins a pass over the examples, always in the same order.
        data: how many are wanted, and how unlike all others they must be.
        labels: of a classification; held-out examples are shared among them evenly.

    Raises:
        InvalidRecipe: an unknown or absent label, or too few examples that may be held out; what
            reading raises.
    """
    ranked, kinds, num_examples = _rank(read, data.seed, labels)
    wanted = {"test": data.num_test, "validation": data.num_validation}
    quotas = {part: _quota(number, len(labels)) for part, number in wanted.items()}
    factor = _CANDIDATES
    while True:
        candidates, is_all = _candidates(ranked, kinds, quotas, factor)
        examples = _collect(read, candidates)
        alone = _unlike_others(read, examples, ranked, data.max_similarity)
        parts = _fill(candidates, alone, kinds, quotas)
        if is_all or all(len(parts[part]) == wanted[part] for part in HELD_OUT):
            break
        factor *= 2
    for part, number in wanted.items():
        if len(parts[part]) < number:
            raise InvalidRecipe(
                f"only {len(parts[part])} examples may be held out for {part}, but data.num_{part} "
                f"is {number}. Lower it, or raise data.max_similarity ({data.max_similarity})."
            )
    held = np.array([i for part in HELD_OUT for i in parts[part]], dtype=np.int64)
    return Holdout(
        train=ranked[~np.isin(ranked, held)],
        held={part: tuple(examples[i] for i in parts[part]) for part in HELD_OUT},
        num_duplicates=num_examples - len(ranked),
    )


def rank_of(text: str, seed: int) -> bytes:
    """Return the 16 bytes that order an example by, and that texts which differ in case share."""
    return hashlib.sha256(f"{seed}\x00{text.lower()}".encode()).digest()[:16]


def _rank(
    read: Callable[[], Iterator[Example]], seed: int, labels: Sequence[str]
) -> tuple[Indices, NDArray[np.int32], int]:
    """Return the positions of distinct texts in the order of their hashes, the label of every example, and how many there are."""
    hashes, kinds = bytearray(), array("i")
    numbers = {label: i for i, label in enumerate(labels)}
    for example in read():
        hashes += rank_of(example.text, seed)
        kinds.append(numbers.get(example.target, -1) if labels else 0)
        if kinds[-1] < 0:
            raise InvalidRecipe(
                f"{example.place} has the label '{example.target}', which is not in task.labels "
                f"{list(labels)}."
            )
    found = np.frombuffer(kinds, dtype=np.int32) if kinds else np.zeros(0, dtype=np.int32)
    absent = set(range(len(labels))) - set(np.unique(found).tolist())
    if absent:
        raise InvalidRecipe(f"no example has the label '{labels[min(absent)]}' of task.labels.")
    halves = np.frombuffer(hashes, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    order = np.lexsort(
        (halves[:, 1], halves[:, 0])
    )  # stable: of equal ones the first read is first
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    return order[is_first], found, len(found)


def _candidates(
    ranked: Indices,
    kinds: NDArray[np.int32],
    quotas: Mapping[str, Counter[int]],
    factor: int,
) -> tuple[list[int], bool]:
    """Return the first examples of each label, in their order, and whether there are no others."""
    places: list[Indices] = []
    is_all = True
    kind_of = kinds[ranked]
    for kind in quotas["test"]:
        number = factor * sum(quota[kind] for quota in quotas.values())
        of_kind = np.flatnonzero(kind_of == kind)
        is_all = is_all and (number >= len(of_kind) or number == 0)
        places.append(of_kind[:number])
    return ranked[np.sort(np.concatenate(places))].tolist(), is_all


def _collect(
    read: Callable[[], Iterator[Example]], candidates: Sequence[int]
) -> dict[int, Example]:
    wanted = set(candidates)
    return {i: example for i, example in enumerate(read()) if i in wanted}


def _unlike_others(
    read: Callable[[], Iterator[Example]],
    candidates: Mapping[int, Example],
    ranked: Indices,
    max_similarity: float,
) -> set[int]:
    """Return the candidates that look like no other example; duplicates do not count."""
    if max_similarity >= 1.0:  # no two sets share more than everything
        return set(candidates)
    numbers = list(candidates)
    near = Lookalikes([words_of(candidates[i].text) for i in numbers], max_similarity)
    is_distinct = np.zeros(1 + int(ranked.max(initial=0)), dtype=bool)
    is_distinct[ranked] = True
    alone = set(numbers)
    for i, example in enumerate(read()):
        if i < len(is_distinct) and is_distinct[i]:
            alone -= {numbers[j] for j in near.of(words_of(example.text))} - {i}
    return alone


def _fill(
    candidates: Sequence[int],
    alone: set[int],
    kinds: NDArray[np.int32],
    quotas: Mapping[str, Counter[int]],
) -> dict[str, list[int]]:
    """Hand the candidates out in their order: to test until it is full, then to validation."""
    left = {part: Counter(quota) for part, quota in quotas.items()}
    parts: dict[str, list[int]] = {part: [] for part in HELD_OUT}
    for i in candidates:
        kind = int(kinds[i])
        part = next((name for name in HELD_OUT if left[name][kind] > 0), None)
        if part is not None and i in alone:
            left[part][kind] -= 1
            parts[part].append(i)
    return parts


def _quota(number: int, num_labels: int) -> Counter[int]:
    """Share ``number`` held-out examples among the labels as evenly as it goes."""
    kinds = max(1, num_labels)
    return Counter({i: number // kinds + (i < number % kinds) for i in range(kinds)})
