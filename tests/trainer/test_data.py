"""Data: sources refuse what is wrong by line, splits hold out honestly, labels mask the prompt."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.bases import PromptBuilder
from lorary.errors import InvalidRecipe, MissingDependency
from lorary.trainer.batches import IGNORED, collate, plan_batches
from lorary.trainer.data import encode_rows, load_splits
from lorary.trainer.encoding import Row
from lorary.trainer.examples import Example
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.similarity import jaccard, words_of
from lorary.trainer.sources import read_examples

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe


def file_recipe(path: Path, **data: Any) -> Recipe:
    return build_recipe(
        {
            "name": "a",
            "task": {"template": "{{ text }}"},
            "data": {"source": "file", "path": str(path), **data},
        }
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x", "target": "y"}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "x", "target": "y"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '\n{"text": "x"}\n', "line 2 has no column 'target'; it has text"),
        ("a.jsonl", '{"text": "x", "target": ""}\n', "line 1: column 'target' is empty"),
        ("a.jsonl", '{"text": "x", "target": null}\n', "column 'target' is None, not text"),
        ("a.jsonl", '{"text": ["x"], "target": "y"}\n', "column 'text' is ['x'], not text"),
        ("a.jsonl", "", "no usable example"),
        ("a.jsonl", "\n \n", "no usable example"),
        ("a.csv", "text,target\nx,y\nx\n", "line 3 has another number of fields"),
        ("a.csv", "text,target\nx,y,z\n", "line 2 has another number of fields"),
        ("a.csv", 'text,target\n"x,y\n', "is not CSV"),
        ("a.csv", "text,label\nx,y\n", "line 2 has no column 'target'"),
        ("a.csv", "text,target\n", "no usable example"),
        ("a.md", "x", "must end in one of .jsonl, .json"),
    ],
)
def test_bad_file_is_refused_by_line(tmp_path: Path, name: str, content: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InvalidRecipe) as caught:
        read_examples(file_recipe(path).data)
    assert says in str(caught.value)


def test_missing_file_and_unknown_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="no such file"):
        read_examples(file_recipe(tmp_path / "none.csv").data)
    recipe = build_recipe({"name": "a", "task": {"template": "x"}, "data": {"source": "reviews"}})
    with pytest.raises(InvalidRecipe, match="one of movie-reviews"):
        read_examples(recipe.data)


def test_byte_order_mark_and_renamed_columns_are_read(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", '{"english": "hat", "french": "chapeau"}\n'),
        ("a.csv", "english,french\nhat,chapeau\n"),
    ):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        recipe = file_recipe(path, columns={"text": "english", "target": "french"})
        assert read_examples(recipe.data) == [Example(inputs={"text": "hat"}, target="chapeau")]


def test_absent_package_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path))
    for source in ("movie-reviews", "news-headlines", "jupyter-fr"):
        recipe = build_recipe({"name": "a", "task": {"template": "x"}, "data": {"source": source}})
        with pytest.raises(MissingDependency, match=r"lorary\.bases fetch"):
            read_examples(recipe.data)


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("text,target\n" + "".join(f"{text},x\n" for text in texts))
    return path


def test_held_out_examples_are_unlike_every_other(tmp_path: Path) -> None:
    """Half of the texts have a near-duplicate; none of those may be the test."""
    rare = [f"alone{i} word{i} thing{i}" for i in range(40)]
    near = [f"pair{i // 2} same{i // 2} text{i // 2} end{i}" for i in range(40)]
    splits = load_splits(
        file_recipe(lines(tmp_path / "a.csv", rare + near), num_test=20, num_validation=10)
    )
    held = [*splits.test, *splits.validation]
    rest = [*splits.train, *held]
    for example in held:
        others = [other for other in rest if other is not example]
        mine = words_of(example.text)
        assert max(jaccard(mine, words_of(other.text)) for other in others) <= 0.5
        assert example.text.startswith("alone")


def test_split_is_disjoint_complete_and_independent_of_order(tmp_path: Path) -> None:
    texts = [f"w{i} v{i}" for i in range(50)]
    recipe = file_recipe(lines(tmp_path / "a.csv", texts), num_test=10, num_validation=5)
    forward = load_splits(recipe)
    lines(tmp_path / "a.csv", [*texts[::-1], texts[0].upper()])
    backward = load_splits(recipe)
    assert backward.num_duplicates == 1
    everything = [*forward.train, *forward.validation, *forward.test]
    assert len({example.text for example in everything}) == 50
    assert {e.text for e in forward.test} == {e.text for e in backward.test}


def test_short_texts_are_left_out_and_long_ones_cut(tmp_path: Path) -> None:
    texts = ["a b", *(f"w{i} v{i} u{i} t{i}" for i in range(9))]
    path = lines(tmp_path / "a.csv", texts)
    recipe = file_recipe(path, num_test=2, num_validation=0, min_words=3, max_words=3)
    splits = load_splits(recipe)
    assert len(splits.train) == 7
    assert {len(e.text.split()) for e in (*splits.train, *splits.test)} == {3}


def test_another_row_moves_no_test_row_but_the_last(tmp_path: Path) -> None:
    texts = [f"w{i} v{i}" for i in range(50)]
    recipe = file_recipe(lines(tmp_path / "a.csv", texts), num_test=10, num_validation=5)
    before = {e.text for e in load_splits(recipe).test}
    lines(tmp_path / "a.csv", [*texts, "new words"])
    assert len(before & {e.text for e in load_splits(recipe).test}) >= 9


def test_fingerprint_is_of_the_rows(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.csv", [f"w{i}" for i in range(9)])
    recipe = file_recipe(path, num_test=2, num_validation=2)
    before = load_splits(recipe).fingerprint
    assert before == load_splits(recipe).fingerprint
    path.write_text(path.read_text().replace("w3,x", "w3,y"))
    assert load_splits(recipe).fingerprint != before


def test_classification_test_is_balanced(make_recipe: Callable[..., Recipe]) -> None:
    splits = load_splits(make_recipe())
    assert [example.target for example in splits.test].count("good") == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__num_test": 100000}, "only 110 examples may be held out for test"),
        ({"data__max_similarity": 0.1}, "raise data.max_similarity"),
        ({"task__labels": ["good", "poor"]}, "the label 'bad', which is not in task.labels"),
        ({"task__labels": ["good", "bad", "odd"]}, "no example has the label 'odd'"),
    ],
)
def test_impossible_split_is_refused(
    make_recipe: Callable[..., Recipe], changes: dict[str, Any], says: str
) -> None:
    recipe = make_recipe()
    task = {"kind": "classification", "template": "{{ text }}", "labels": ["good", "bad"]}
    task |= {key.removeprefix("task__"): v for key, v in changes.items() if "task" in key}
    data = {key: value for key, value in changes.items() if key.startswith("data")}
    del recipe
    with pytest.raises(InvalidRecipe) as caught:
        load_splits(make_recipe(task=task, **data))
    assert says in str(caught.value)


def test_rows_learn_the_answer_and_its_end_and_no_prompt(
    make_recipe: Callable[..., Recipe], tiny_base: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    builder, task = PromptBuilder(tokenizer), make_recipe().task.to_manifest()
    examples = [
        Example(inputs={"text": "the film"}, target="good"),
        Example(inputs={"text": "the big red film"}, target="bad"),
    ]
    rows, num_too_long = encode_rows(examples, task, builder, 64)
    batch = collate(rows, pad_token_id=tokenizer.pad_token_id)
    assert num_too_long == 0
    for i, example in enumerate(examples):
        prompt = builder.from_task(task, example.inputs)  # what a server computes
        assert batch["input_ids"][i, : len(prompt)].tolist() == prompt
        labels = batch["labels"][i]
        assert (labels[: len(prompt)] == IGNORED).all()
        learned = labels[labels != IGNORED].tolist()
        assert learned == [*builder.label_ids(example.target), tokenizer.eos_token_id]


def test_too_long_rows_are_left_out_and_counted(
    make_recipe: Callable[..., Recipe], tiny_base: Path
) -> None:
    from transformers import AutoTokenizer

    builder = PromptBuilder(AutoTokenizer.from_pretrained(tiny_base))
    task = make_recipe().task.to_manifest()
    short, long = (Example(inputs={"text": "the " * n}, target="good") for n in (1, 60))
    rows, num_too_long = encode_rows([short, long], task, builder, 40)
    assert (len(rows), num_too_long) == (1, 1)
    with pytest.raises(InvalidRecipe, match="all 1 examples are longer"):
        encode_rows([long], task, builder, 40)
    with pytest.raises(InvalidRecipe, match="special token"):
        encode_rows([Example(inputs={"text": "<|im_end|>"}, target="good")], task, builder, 40)


@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_plan_takes_every_row_once_a_pass(lengths: list[int], batch_size: int, seed: int) -> None:
    per_pass = -(-len(lengths) // batch_size)
    plan = plan_batches(lengths, batch_size=batch_size, num_batches=2 * per_pass, seed=seed)
    for start in (0, per_pass):
        one_pass = list(itertools.chain(*plan[start : start + per_pass]))
        assert sorted(one_pass) == list(range(len(lengths)))
    again = plan_batches(lengths, batch_size=batch_size, num_batches=3, seed=seed)
    assert again == plan_batches(lengths, batch_size=batch_size, num_batches=9, seed=seed)[:3]


def test_plan_pads_little() -> None:
    lengths = [i % 50 + 1 for i in range(1000)]
    plan = plan_batches(lengths, batch_size=10, num_batches=100, seed=0)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in plan)
    assert padded < 1.1 * sum(lengths)


def test_collate_pads_with_ignored_labels() -> None:
    rows = [Row(input_ids=(5, 6, 7), num_prompt=1), Row(input_ids=(8, 9), num_prompt=1)]
    batch = collate(rows, pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
