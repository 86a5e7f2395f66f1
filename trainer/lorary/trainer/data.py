"""From examples to held-out splits and token rows.

The split is a function of content: every example is ranked by a hash of its text and the seed, so
adding rows moves none of the others, and order in the file does not matter. Only examples unlike
all others may be held out (``max_similarity``), so a near-duplicate of a test row is never trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe, InvalidRequest
from lorary.trainer.sources import Example, read_examples

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lorary.bases.prompts import PromptBuilder
    from lorary.registry.manifest import Task
    from lorary.trainer.recipe import DataRecipe, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Disjoint examples, in the order of their hash."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    num_duplicates: int

    @property
    def fingerprint(self) -> str:
        """``sha256:`` over the canonical rows of the three parts."""
        digest = hashlib.sha256()
        for part in ("train", "validation", "test"):
            for example in getattr(self, part):
                row = [part, dict(example.inputs), example.target]
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Token ids to train on: the first ``num_prompt`` are read, the rest are learned."""

    input_ids: tuple[int, ...]
    num_prompt: int


def load_splits(recipe: Recipe) -> Splits:
    """Read, de-duplicate and split the recipe's data.

    Raises:
        InvalidRecipe: a label outside the task's, or too few examples for what is held out.
        MissingDependency: an asset package that is not fetched.
    """
    data = recipe.data
    examples, num_duplicates = _distinct(read_examples(data), data)
    if recipe.task.kind == "classification":
        _check_labels(examples, recipe.task.labels)
    examples.sort(key=lambda example: _rank(example, data.seed))
    words = [words_of(example.text) for example in examples]
    near = Neighbours(words, data.max_similarity)
    wanted = {"test": data.num_test, "validation": data.num_validation}
    quotas = {part: _quota(number, recipe.task.labels) for part, number in wanted.items()}
    parts: dict[str, list[Example]] = {"test": [], "validation": [], "train": []}
    for i, example in enumerate(examples):
        key = example.target if recipe.task.labels else ""
        part = next((name for name in quotas if quotas[name][key] > 0), "train")
        if part != "train" and near.has_any(i):
            part = "train"
        if part != "train":
            quotas[part][key] -= 1
        parts[part].append(example)
    for part, number in wanted.items():
        if len(parts[part]) < number:
            raise InvalidRecipe(
                f"only {len(parts[part])} examples may be held out for {part}, but data.num_{part} "
                f"is {number}. Lower it, or raise data.max_similarity ({data.max_similarity})."
            )
    if not parts["train"]:
        raise InvalidRecipe("nothing is left to train on; lower data.num_test.")
    train = parts["train"][: data.max_train] if data.max_train else parts["train"]
    return Splits(
        train=tuple(train),
        validation=tuple(parts["validation"]),
        test=tuple(parts["test"]),
        num_duplicates=num_duplicates,
    )


def encode_rows(
    examples: Iterable[Example], task: Task, builder: PromptBuilder, max_length: int
) -> tuple[list[Row], int]:
    """Turn examples into rows; ``prompt + target + end``, tokenized as when served.

    Returns:
        The rows, and how many examples were left out because they are longer than ``max_length``.

    Raises:
        InvalidRecipe: the template cannot be rendered, an example holds a special token, or every
            example is too long.
    """
    rows, num_too_long, total = [], 0, 0
    for example in examples:
        total += 1
        try:
            prompt = builder.from_task(task, example.inputs)
            completion = builder.completion_ids(example.target)
        except InvalidRequest as error:
            raise InvalidRecipe(f"an example cannot be tokenized: {error}") from error
        if len(prompt) + len(completion) > max_length:
            num_too_long += 1
        else:
            rows.append(Row(input_ids=(*prompt, *completion), num_prompt=len(prompt)))
    if total and not rows:
        raise InvalidRecipe(
            f"all {total} examples are longer than training.max_length ({max_length} tokens). "
            "Raise it, or cut texts with data.max_words."
        )
    return rows, num_too_long


def words_of(text: str) -> frozenset[str]:
    """Return the lower-case words of a text, for comparing texts."""
    return frozenset(re.findall(r"\w+", text.lower()))


class Neighbours:
    """Finds, for one text, whether any other shares more than a word-Jaccard of ``threshold``.

    Two sets of words with a Jaccard above t share one of the ``(1 - t)`` rarest of each (prefix
    filter), so only texts that meet in such a rare word are compared.
    """

    def __init__(self, words: Sequence[frozenset[str]], threshold: float) -> None:
        self._words = words
        self._threshold = threshold
        counts = Counter(word for one in words for word in one)
        self._rare = [self._rarest(one, counts) for one in words]
        self._where: dict[str, list[int]] = {}
        for i, rare in enumerate(self._rare):
            for word in rare:
                self._where.setdefault(word, []).append(i)

    def has_any(self, index: int) -> bool:
        """Whether another text is more similar to this one than the threshold."""
        mine = self._words[index]
        candidates = {j for word in self._rare[index] for j in self._where[word]} - {index}
        return any(jaccard(mine, self._words[j]) > self._threshold for j in candidates)

    def _rarest(self, words: frozenset[str], counts: Counter[str]) -> list[str]:
        ordered = sorted(words, key=lambda word: (counts[word], word))
        return ordered[: len(words) - int(self._threshold * len(words)) + 1]


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return shared words over all words; 0 when both are empty."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0


def data_facts(splits: Splits, recipe: Recipe, num_too_long: int) -> dict[str, Any]:
    """Return what the manifest says about the data."""
    return {
        "source": recipe.data.source,
        "fingerprint": splits.fingerprint,
        "num_train": len(splits.train),
        "num_validation": len(splits.validation),
        "num_test": len(splits.test),
        "num_duplicates_dropped": splits.num_duplicates,
        "num_too_long_dropped": num_too_long,
        "held_out_max_similarity": recipe.data.max_similarity,
    }


def _distinct(examples: Sequence[Example], data: DataRecipe) -> tuple[list[Example], int]:
    """Cut or leave out texts by their number of words, and drop those seen before."""
    kept: dict[str, Example] = {}
    num_duplicates = 0
    for example in examples:
        words = example.inputs.get("text", "").split()
        if "text" in example.inputs and len(words) < data.min_words:
            continue
        if data.max_words and len(words) > data.max_words:
            text = " ".join(words[: data.max_words])
            example = replace(example, inputs={**example.inputs, "text": text})
        key = example.text.lower()
        num_duplicates += key in kept
        kept.setdefault(key, example)
    return list(kept.values()), num_duplicates


def _check_labels(examples: Iterable[Example], labels: Sequence[str]) -> None:
    found = {example.target for example in examples}
    unknown = sorted(found - set(labels))
    if unknown:
        raise InvalidRecipe(
            f"the data has the label '{unknown[0]}', which is not in task.labels {list(labels)}."
        )
    absent = [label for label in labels if label not in found]
    if absent:
        raise InvalidRecipe(f"no example has the label '{absent[0]}' of task.labels.")


def _rank(example: Example, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\x00{example.text.lower()}".encode()).digest()


def _quota(number: int, labels: Sequence[str]) -> Counter[str]:
    """Share ``number`` held-out examples among the labels as evenly as it goes."""
    keys = list(labels) or [""]
    return Counter(
        {key: number // len(keys) + (i < number % len(keys)) for i, key in enumerate(keys)}
    )
