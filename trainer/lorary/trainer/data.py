"""From a recipe's data to held-out splits and token rows.

The split is a function of content: every example is ranked by a hash of its text and the seed, so
adding rows moves none of the others, and order in the file does not matter. Only examples unlike
all others may be held out (``max_similarity``), so a near-duplicate of a test row is never trained on.

Large data is read in passes and never held: a streamed run has the same splits, fingerprint and rows in
the same order as one that reads everything into memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorary.errors import InvalidRecipe
from lorary.trainer.encoding import Encoder, Row
from lorary.trainer.examples import Example
from lorary.trainer.holdout import hold_out
from lorary.trainer.sources import open_source, resolve_shape
from lorary.trainer.token_store import StoredRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from lorary.bases.prompts import PromptBuilder
    from lorary.registry.manifest import Task
    from lorary.trainer.recipe import DataRecipe, Recipe

STREAMED_BYTES = 128 << 20
"""Files above this size are read in passes, where the recipe does not say otherwise."""


class StreamedExamples(Collection[Example]):
    """Examples that are read again at every pass, in the order of the data.

    Args:
        read: begins a pass over all examples.
        train: int64 [N], the positions of these among them, in the order of their hashes.
    """

    def __init__(self, read: Callable[[], Iterator[Example]], train: NDArray[np.int64]) -> None:
        self._read = read
        self._num = len(train)
        self._places = np.full(1 + int(train.max(initial=-1)), -1, dtype=np.int64)
        self._places[train] = np.arange(len(train))
        self._digests: bytes | None = None

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Example]:
        return (example for _, example in self.placed())

    def __contains__(self, example: object) -> bool:
        return any(one == example for one in self)

    def placed(self) -> Iterator[tuple[int, Example]]:
        """Yield every example behind its place in the order of hashes."""
        for i, example in enumerate(self._read()):
            if i < len(self._places) and self._places[i] >= 0:
                yield int(self._places[i]), example

    def digests(self) -> bytes:
        """Return the digests of all examples in the order of hashes; reads the data once."""
        if self._digests is None:
            found = np.zeros((self._num, 32), dtype=np.uint8)
            for place, example in self.placed():
                found[place] = np.frombuffer(_digest(example), dtype=np.uint8)
            self._digests = found.tobytes()
        return self._digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Disjoint examples, in the order of their hash; of ``train`` where it is in memory."""

    train: Collection[Example]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    num_duplicates: int

    @property
    def fingerprint(self) -> str:
        """``sha256:`` over the digests of the canonical rows of the three parts, in the order of their hash."""
        digest = hashlib.sha256()
        for name, part in (
            ("train", self.train),
            ("validation", self.validation),
            ("test", self.test),
        ):
            digest.update(f"{name} {len(part)}\n".encode())
            if isinstance(part, StreamedExamples):
                digest.update(part.digests())
            else:
                for example in part:
                    digest.update(_digest(example))
        return f"sha256:{digest.hexdigest()}"


def load_splits(recipe: Recipe) -> Splits:
    """Read, de-duplicate and split the recipe's data.

    Raises:
        InvalidRecipe: a label outside the task's, or too few examples for what is held out.
        MissingDependency: an asset package that is not fetched, a library that is not installed.
    """
    data = resolve_shape(recipe).data
    source = open_source(data)

    def read() -> Iterator[Example]:
        return _usable(source.read(), data)

    is_streamed = data.streaming == "always" or (
        data.streaming == "auto" and source.num_bytes > STREAMED_BYTES
    )
    examples = None if is_streamed else list(read())
    passes = read if examples is None else lambda: iter(examples)
    if next(passes(), None) is None:
        raise InvalidRecipe(f"data source '{data.path or data.source}' has no usable example.")
    found = hold_out(passes, data, recipe.task.labels if recipe.task.target_is_label else ())
    if not len(found.train):
        raise InvalidRecipe("nothing is left to train on; lower data.num_test.")
    train = found.train[: data.max_train] if data.max_train else found.train
    return Splits(
        train=StreamedExamples(read, train)
        if examples is None
        else tuple(examples[i] for i in train),
        validation=found.held["validation"],
        test=found.held["test"],
        num_duplicates=found.num_duplicates,
    )


def encode_rows(
    examples: Iterable[Example], task: Task, builder: PromptBuilder, max_length: int
) -> tuple[Sequence[Row], int]:
    """Turn examples into rows, tokenized as when served; those of ``StreamedExamples`` are kept on disk.

    Returns:
        The rows, and how many were left out because they are longer than ``max_length``.

    Raises:
        InvalidRecipe: the template cannot be rendered, an example holds a special token or teaches
            nothing, or every example is too long.
        StorageError: rows cannot be written.
    """
    encoder = Encoder(builder, task)
    num_too_long = 0

    def fitting(placed: Iterable[tuple[int, Example]]) -> Iterator[tuple[int, Row]]:
        nonlocal num_too_long
        for place, example in placed:
            for row in encoder.rows(example, max_length):
                if len(row.input_ids) <= max_length:
                    yield place, row
                else:
                    num_too_long += 1

    rows: Sequence[Row]
    if isinstance(examples, StreamedExamples):
        rows = StoredRows(fitting(examples.placed()))
    else:
        rows = [row for _, row in fitting(enumerate(examples))]
    if num_too_long and not rows:
        raise InvalidRecipe(
            f"all {num_too_long} examples are longer than training.max_length ({max_length} "
            "tokens). Raise it, or cut texts with data.max_words."
        )
    return rows, num_too_long


def data_facts(splits: Splits, recipe: Recipe, num_too_long: int) -> dict[str, Any]:
    """Return what the manifest says about the data."""
    return {
        "source": recipe.data.source,
        "shape": recipe.data.shape,
        "fingerprint": splits.fingerprint,
        "num_train": len(splits.train),
        "num_validation": len(splits.validation),
        "num_test": len(splits.test),
        "num_duplicates_dropped": splits.num_duplicates,
        "num_too_long_dropped": num_too_long,
        "held_out_max_similarity": recipe.data.max_similarity,
    }


def _usable(examples: Iterable[Example], data: DataRecipe) -> Iterator[Example]:
    """Cut or leave out texts by their number of words."""
    for example in examples:
        if example.form in ("template", "text") and "text" in example.inputs:
            words = example.inputs["text"].split()
            if len(words) < data.min_words:
                continue
            if data.max_words and len(words) > data.max_words:
                text = " ".join(words[: data.max_words])
                example = replace(example, inputs={**example.inputs, "text": text})
        yield example


def _digest(example: Example) -> bytes:
    """Return the sha256 of what an example says."""
    return hashlib.sha256(
        json.dumps(example.content, sort_keys=True, ensure_ascii=False).encode(
            errors="surrogatepass"
        )
    ).digest()
