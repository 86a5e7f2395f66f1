"""Read a recipe: YAML to the dataclasses of ``recipe``, strictly, with ``--set`` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from lorary.errors import InvalidRecipe
from lorary.trainer.recipe import DataRecipe, MethodRecipe, Recipe
from lorary.trainer.tasks.recipe import TasksRecipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAX_BYTES = 1 << 20
# What only recipes with several tasks have, and what these have once in every task.
_OF_SEVERAL = ("tasks", "adapters", "temperature")
_OF_EACH = ("task", "data")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe with one task.

    Args:
        path: a YAML file.
        overrides: ``key.subkey=value``, the value in YAML; later ones win.

    Raises:
        InvalidRecipe: no such file, not YAML, an unknown or missing key, a wrong type or range, or
            several tasks.
    """
    recipe = load_any_recipe(path, overrides)
    if isinstance(recipe, TasksRecipe):
        raise InvalidRecipe(
            f"recipe '{path}' has several tasks, which lorary train and lorary eval take; give each of "
            "them a recipe of its own here."
        )
    return recipe


def load_any_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | TasksRecipe:
    """Read and check a recipe, of several tasks where it has the key ``tasks``.

    Raises:
        InvalidRecipe: as ``load_recipe``, but for several tasks.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidRecipe(f"recipe '{path}' cannot be read: {error.strerror}.") from error
    if len(raw) > _MAX_BYTES:
        raise InvalidRecipe(f"recipe '{path}' has {len(raw)} bytes; the limit is {_MAX_BYTES}.")
    try:
        tree = yaml.load(raw.decode("utf-8-sig"), Loader=_StrictLoader)  # noqa: S506 - is a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"recipe '{path}' is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InvalidRecipe(f"recipe '{path}' is not a mapping of keys; see docs/recipes.md.")
    for override in overrides:
        _apply(tree, override)
    recipe = build_any_recipe(tree)
    folder = path.parent
    if isinstance(recipe, Recipe):
        return dataclasses.replace(
            recipe,
            method=_method_from(folder, recipe.method),
            data=_data_from(folder, recipe.data),
        )
    tasks = {
        name: dataclasses.replace(entry, data=_data_from(folder, entry.data))
        for name, entry in recipe.tasks.items()
    }
    return dataclasses.replace(recipe, method=_method_from(folder, recipe.method), tasks=tasks)


def build_any_recipe(tree: Mapping[str, Any]) -> Recipe | TasksRecipe:
    """Build a recipe of one task or several from plain data; raises what ``load_any_recipe`` raises."""
    if not any(key in tree for key in _OF_SEVERAL):
        return build_recipe(tree)
    misplaced = next((key for key in _OF_EACH if key in tree), None)
    if misplaced is not None:
        given = next(key for key in _OF_SEVERAL if key in tree)
        raise InvalidRecipe(
            f"the recipe has '{misplaced}' beside '{given}', which is for several tasks; put it into "
            f"each of them, as tasks.NAME.{misplaced}."
        )
    if "search" in tree:
        raise InvalidRecipe(
            "the recipe has 'search' and several tasks; a search is judged by the loss of one. Search in "
            "a recipe of its own, and write what was found here."
        )
    recipe = _build(TasksRecipe, tree, "")
    assert isinstance(recipe, TasksRecipe)
    return recipe


def build_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe with one task from plain data; raises what ``load_recipe`` raises."""
    recipe = _build(Recipe, tree, "")
    assert isinstance(recipe, Recipe)
    if recipe.search.space:
        from lorary.trainer.search.points import check_space  # which builds recipes itself

        check_space(recipe)
    return recipe


def recipe_dict(recipe: Recipe | TasksRecipe) -> dict[str, Any]:
    """Return the recipe as plain data, which ``build_any_recipe`` reads back."""
    plain = dataclasses.asdict(recipe)
    result = _plain(plain)
    assert isinstance(result, dict)
    return result


def _method_from(folder: Path, method: MethodRecipe) -> MethodRecipe:
    """Return the method with its plan as seen from a recipe's folder."""
    if not method.quantization_plan:
        return method
    plan = str((folder / method.quantization_plan).resolve())
    return dataclasses.replace(method, quantization_plan=plan)


def _data_from(folder: Path, data: DataRecipe) -> DataRecipe:
    """Return the data with its file as seen from a recipe's folder."""
    if not data.path or data.source == "hub":
        return data
    return dataclasses.replace(data, path=str((folder / data.path).resolve()))


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, of which YAML keeps one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key}' is given twice", problem_mark=key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one ``a.b=value`` in the tree."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InvalidRecipe(f"--set '{override}' is not of the form key.subkey=value.")
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - is a SafeLoader
    except yaml.YAMLError as error:
        raise InvalidRecipe(f"--set '{override}': the value is not valid YAML: {error}") from error
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise InvalidRecipe(f"--set '{override}': '{part}' is a value, not a group of keys.")
    node[parts[-1]] = value


def _build(cls: type[Any], raw: Any, where: str) -> Any:
    """Build one dataclass: known keys only, each converted to its type."""
    if not isinstance(raw, dict):
        raise InvalidRecipe(f"{where or 'the recipe'} is {raw!r}; it must be a group of keys.")
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            raise InvalidRecipe(_unknown_key(str(key), where, hints))
    fields = dataclasses.fields(cls)
    for spec in fields:
        is_required = (
            spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        )
        if is_required and spec.name not in raw:
            raise InvalidRecipe(f"the recipe lacks '{_join(where, spec.name)}'; add it.")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in raw.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert one YAML value to the type of its field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where)
    if origin is Literal:
        # YAML reads none, on and off as other things than these words.
        text = "none" if value is None else value
        if text not in args:
            raise InvalidRecipe(f"{where} is {value!r}; it is one of {', '.join(map(str, args))}.")
        return text
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise InvalidRecipe(f"{where} is {value!r}; it must be a list.")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, dict):
            raise InvalidRecipe(f"{where} is {value!r}; it must be a group of keys.")
        return {str(k): _convert_entry(args[1], v, f"{where}.{k}") for k, v in value.items()}
    assert not isinstance(hint, types.UnionType), "recipes have no optional fields"
    return _scalar(hint, value, where)


def _convert_entry(hint: Any, value: Any, where: str) -> Any:
    """Convert a named value; what is wrong inside a group is said with its name."""
    try:
        return _convert(hint, value, where)
    except InvalidRecipe as error:
        if where in str(error):
            raise
        raise InvalidRecipe(f"{where}: {error}") from error


def _scalar(hint: type[Any], value: Any, where: str) -> Any:
    """Convert a bool, int, float or str; YAML reads ``5e-4`` as a string, so floats parse those."""
    if hint is float and type(value) is not bool:
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is hint:
        return value
    raise InvalidRecipe(f"{where} is {value!r}; it must be of type {hint.__name__}.")


def _unknown_key(key: str, where: str, hints: Mapping[str, Any]) -> str:
    """Say which key is unknown, and which is nearest."""
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)
    hint = f"Did you mean '{_join(where, near[0])}'? " if near else ""
    return f"recipe key '{_join(where, key)}' is unknown. {hint}Valid keys: {', '.join(hints)}."


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
