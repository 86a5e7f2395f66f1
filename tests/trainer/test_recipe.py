"""Recipes: everything that can be wrong in one is found before any work, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorary.errors import InvalidRecipe
from lorary.trainer import load_recipe
from lorary.trainer.recipe_file import build_recipe, load_any_recipe, recipe_dict

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = "name: a\ntask: {template: '{{ text }}'}\ndata: {source: jupyter-fr}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_valid_and_named_as_its_file(path: Path) -> None:
    assert load_any_recipe(path).name == path.stem


def test_recipe_survives_a_round_trip() -> None:
    recipe = load_recipe(RECIPES[0])
    assert build_recipe(recipe_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("nmae: b\n", "Did you mean 'name'"),
        ("training: {learning_rte: 1}\n", "Did you mean 'training.learning_rate'"),
        ("training: {learning_rate: fast}\n", "training.learning_rate is 'fast'"),
        ("training: {learning_rate: .nan}\n", "training.learning_rate is nan"),
        ("training: {learning_rate: 0}\n", "between 1e-09 and 1"),
        ("training: {max_steps: 0}\n", "training.max_steps is 0"),
        ("training: {max_steps: 1.5}\n", "must be of type int"),
        ("training: {max_steps: true}\n", "must be of type int"),
        ("training: {max_steps: null}\n", "must be of type int"),
        ("training: {schedule: wavy}\n", "one of linear, cosine, constant"),
        ("training: [1]\n", "must be a group of keys"),
        ("method: {rank: 513}\n", "method.rank is 513"),
        ("method: {name: qlora, quantization: none}\n", "use lora"),
        ("method: {quantization: nf4}\n", "set method.name to qlora"),
        ("method: {target_modules: []}\n", "use [all-linear]"),
        ("method: {target_modules: {a: b}}\n", "must be a list"),
        ("evaluation: {metric: accuracy}\n", "accuracy for a generation"),
        ("name: ../up\n", "key 'name' is given twice"),
        ("base: ''\n", "base is empty"),
    ],
)
def test_bad_recipe_says_what_is_wrong(tmp_path: Path, change: str, says: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        load_recipe(write(tmp_path, MINIMAL + change))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({}, "lacks 'name'"),
        ({"name": "a"}, "lacks 'data'"),
        ({"name": "Big"}, "name is 'Big'"),
        ({"name": "../up"}, "name is '../up'"),
        ({"task": {}}, "task.template is empty"),
        ({"task": {"template": " "}}, "task.template is empty"),
        ({"task": {"template": "x", "labels": ["a", "b"]}}, "set task.kind"),
        ({"task": {"template": "x", "kind": "classification", "labels": ["a"]}}, "at least two"),
        ({"task": {"template": "x", "kind": "classification", "labels": ["a", "a"]}}, "repeats"),
        ({"task": {"template": "x", "stop": [""]}}, "task.stop"),
        ({"task": {"template": "x", "max_new_tokens": 0}}, "task.max_new_tokens is 0"),
        ({"data": {"source": "file"}}, "data.path is empty"),
        ({"data": {"source": "jupyter-fr", "path": "x"}}, "are for source 'file' and"),
        ({"data": {"source": "jupyter-fr", "num_test": 0}}, "data.num_test is 0"),
        ({"data": {"source": "jupyter-fr", "columns": [1]}}, "must be a group of keys"),
    ],
)
def test_bad_tree_says_what_is_wrong(tree: dict[str, Any], says: str) -> None:
    if tree and tree != {"name": "a"}:
        tree = {"name": "a", "task": {"template": "x"}, "data": {"source": "jupyter-fr"}} | tree
    with pytest.raises(InvalidRecipe) as caught:
        build_recipe(tree)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a mapping"),
        (b"- 1\n", "not a mapping"),
        (b"a: [\n", "not valid YAML"),
        (b"\xff\xfe", "not valid YAML"),
        (b"a: 1\na: 2\n", "'a' is given twice"),
        (b"a: !!python/object:os.system {}\n", "not valid YAML"),
        (b"x" * (2 << 20), "the limit is"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidRecipe) as caught:
        load_recipe(path)
    assert says in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_set_changes_one_key_and_the_last_wins(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(
        path, ["training.max_steps=7", "training.max_steps=9", "training.learning_rate=1e-3"]
    )
    assert (recipe.training.max_steps, recipe.training.learning_rate) == (9, 1e-3)
    assert load_recipe(path, ["task.stop=['a', 'b']"]).task.stop == ("a", "b")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.max_steps", "not of the form"),
        ("=1", "not of the form"),
        ("training..x=1", "not of the form"),
        ("name.x=1", "'name' is a value"),
        ("training.max_step=1", "Did you mean 'training.max_steps'"),
        ("training.max_steps=[", "not valid YAML"),
        ("training.max_steps=-1", "training.max_steps is -1"),
    ],
)
def test_bad_override_says_what_is_wrong(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert says in str(caught.value)


def test_data_path_is_relative_to_the_recipe(tmp_path: Path) -> None:
    text = "name: a\ntask: {template: '{{ text }}'}\ndata: {source: file, path: rows.csv}\n"
    assert load_recipe(write(tmp_path, text)).data.path == str(tmp_path / "rows.csv")


def test_defaults_are_resolved() -> None:
    recipe = build_recipe(
        {
            "name": "a",
            "task": {"template": "x"},
            "data": {"source": "jupyter-fr"},
            "method": {"name": "qlora", "rank": 4},
            "training": {"max_steps": 10},
        }
    )
    assert recipe.method.base_quantization == "nf4"
    assert recipe.method.scaled_alpha == 8.0
    assert recipe.training.steps_between_evals == 3
    assert recipe.metric == "rouge"
