"""The table of recipe keys in docs/recipes.md, generated from the classes that define them.

``python -m lorary.trainer.recipe_docs`` prints both tables; a test holds the document to them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from typing import Any

from lorary.trainer.recipe import Recipe
from lorary.trainer.tasks.recipe import TaskEntry, TasksRecipe


def key_table() -> str:
    """Return one Markdown table of every key, its type, default and meaning."""
    return _table(_rows(Recipe, ""))


def tasks_key_table() -> str:
    """Return the table of the keys that recipes with several tasks have besides."""
    known = {spec.name for spec in dataclasses.fields(Recipe)}
    hints, meanings = typing.get_type_hints(TasksRecipe), _meanings(TasksRecipe)
    rows = [
        (spec.name, _kind(hints[spec.name]), _default(spec), meanings[spec.name])
        for spec in dataclasses.fields(TasksRecipe)
        if spec.name not in known
    ]
    hints, meanings = typing.get_type_hints(TaskEntry), _meanings(TaskEntry)
    rows += [
        (f"tasks.NAME.{spec.name}", _kind(hints[spec.name]), _default(spec), meanings[spec.name])
        for spec in dataclasses.fields(TaskEntry)
    ]
    return _table(rows)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{key}` | {kind} | {value} | {meaning} |" for key, kind, value, meaning in rows]
    return "\n".join(lines) + "\n"


def _rows(cls: type[Any], prefix: str) -> list[tuple[str, str, str, str]]:
    rows = []
    hints, meanings = typing.get_type_hints(cls), _meanings(cls)
    for spec in dataclasses.fields(cls):
        hint = hints[spec.name]
        if dataclasses.is_dataclass(hint):
            rows += _rows(typing.cast("type[Any]", hint), f"{prefix}{spec.name}.")
        else:
            row = (prefix + spec.name, _kind(hint), _default(spec), meanings[spec.name])
            rows.append(row)
    return rows


def _kind(hint: Any) -> str:
    """Name a type as a person writing YAML would."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return "group of keys"
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is tuple:
        return "list of text" if args[0] is str else f"list of {_kind(args[0])}"
    if origin is dict:
        names = {str: "group of text", TaskEntry: "group of tasks"}
        return names.get(args[1], "group of lists or ranges")
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names[hint]


def _default(spec: dataclasses.Field[Any]) -> str:
    value = spec.default
    if spec.default_factory is not dataclasses.MISSING:
        value = spec.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if dataclasses.is_dataclass(value):
        return "theirs"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`" if value not in ("", {}) else "empty"


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Read the strings below a class' attributes, which Python itself does not keep."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    meanings = {}
    for attribute, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(attribute, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(attribute.target, ast.Name)
            assert isinstance(after.value, ast.Constant)
            meanings[attribute.target.id] = " ".join(str(after.value.value).split())
    return {name: text.replace("``", "`") for name, text in meanings.items()}


if __name__ == "__main__":
    sys.stdout.write(f"{key_table()}\n{tasks_key_table()}")
