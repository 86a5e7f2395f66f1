"""Data read in passes gives the splits, fingerprint and rows of data in memory, and leaves nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.bases import PromptBuilder
from lorary.errors import StorageError
from lorary.trainer import data as data_module
from lorary.trainer.data import StreamedExamples, encode_rows, load_splits
from lorary.trainer.encoding import Row
from lorary.trainer.holdout import rank_of
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.similarity import Lookalikes, jaccard
from lorary.trainer.token_store import StoredRows, row_lengths
from tests.conftest import WORDS, build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.trainer.recipe import Recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Texts of which some are duplicates and some look alike, under two labels."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 9)) for _ in range(120)]
    texts += [f"{text} very" for text in texts[:40]] + texts[:10]
    rows = [{"text": text, "target": WORDS[14 + len(text) % 2]} for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(file: Path, streaming: str, **data: Any) -> Recipe:
    tree = {"source": "file", "path": str(file), "num_test": 12, "num_validation": 7}
    task = {"kind": "classification", "template": "{{ text }}:", "labels": [WORDS[14], WORDS[15]]}
    return build_recipe(
        {"name": "a", "task": task, "data": {**tree, "streaming": streaming, **data}}
    )


@pytest.mark.parametrize("similarity", [0.5, 1.0])
def test_streamed_data_is_split_and_encoded_as_data_in_memory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, similarity: float
) -> None:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "home"))
    builder = PromptBuilder(build_tokenizer())
    found = []
    for streaming in ("never", "always"):
        recipe = recipe_of(file, streaming, max_similarity=similarity, max_train=90)
        splits = load_splits(recipe)
        rows, _ = encode_rows(splits.train, recipe.task.to_manifest(), builder, 64)
        found.append((splits, rows))
    (memory, in_memory), (streamed, stored) = found
    assert isinstance(streamed.train, StreamedExamples)
    assert isinstance(stored, StoredRows)
    assert (streamed.test, streamed.validation) == (memory.test, memory.validation)
    assert streamed.num_duplicates == memory.num_duplicates == 10
    assert streamed.fingerprint == memory.fingerprint
    assert list(stored) == in_memory
    assert row_lengths(stored) == row_lengths(in_memory)
    assert len(stored) == len(streamed.train) == 90
    assert list((tmp_path / "home").iterdir()) == []  # the file has no name


def test_candidates_grow_until_enough_are_unlike_all_others(tmp_path: Path) -> None:
    """The examples ranked first all have a lookalike: those behind them are held out."""
    texts = sorted((f"w{i} v{i} u{i}" for i in range(64)), key=lambda text: rank_of(text, 0))
    rows = [*texts, *(f"{text} too" for text in texts[:50])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t, "target": "x"}) + "\n" for t in rows))
    tree = {"source": "file", "path": str(path), "num_test": 5, "num_validation": 2}
    splits = load_splits(
        build_recipe({"name": "a", "task": {"template": "{{ text }}"}, "data": tree})
    )
    assert [example.text for example in splits.test] == texts[50:55]
    assert [example.text for example in splits.validation] == texts[55:57]


def test_large_files_are_streamed_by_themselves(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(load_splits(recipe_of(file, "auto")).train, tuple)
    monkeypatch.setattr(data_module, "STREAMED_BYTES", 100)
    assert isinstance(load_splits(recipe_of(file, "auto")).train, StreamedExamples)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    flags = [False, *draw(st.lists(st.booleans(), max_size=9)), True]
    bounds = [i for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
    return Row(
        input_ids=tuple(draw(st.integers(0, 2**31 - 1)) for _ in flags),
        num_prompt=bounds[0],
        unlearned=tuple(zip(bounds[1::2], bounds[2::2], strict=True)),
    )


@given(given_rows=st.lists(rows(), max_size=6), seed=st.integers(0, 9))
def test_stored_rows_come_back_by_place(given_rows: list[Row], seed: int) -> None:
    places = np.random.default_rng(seed).permutation(len(given_rows)).tolist()
    stored = StoredRows((place, given_rows[place]) for place in places)
    assert list(stored) == given_rows
    assert stored[:2] == given_rows[:2]


def test_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_HOME", "/proc/none")
    with pytest.raises(StorageError, match="LORARY_HOME"):
        StoredRows([])


words = st.frozensets(st.sampled_from("abcdefgh"), max_size=6)


@given(texts=st.lists(words, min_size=1, max_size=12), threshold=st.floats(0.05, 1.0))
def test_lookalikes_agree_with_comparing_all_pairs(
    texts: list[frozenset[str]], threshold: float
) -> None:
    near = Lookalikes(texts[::2], threshold)
    for mine in texts:
        expected = [i for i, one in enumerate(texts[::2]) if jaccard(mine, one) > threshold]
        assert near.of(mine) == expected
