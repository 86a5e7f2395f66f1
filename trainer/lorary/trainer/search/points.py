"""From a space to recipes: which keys may be searched, and the recipe at one point of the space.

A search compares validation losses, so a key that changes which examples are held out, or what a loss
is a mean over, cannot be searched: two such trials would not be measured alike, and another split would
train on rows that are another trial's test.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe
from lorary.trainer.recipe import Recipe
from lorary.trainer.recipe_file import build_recipe, recipe_dict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorary.trainer.search.space import Dimension

_ALLOWED = ("data.max_train", "task.template")
_REFUSED = {
    "name": "it changes nothing that is trained",
    "description": "it changes nothing that is trained",
    "base": "losses over the tokens of two tokenizers are not alike",
    "data": "another choice of held-out examples makes losses that cannot be compared",
    "task": "losses of two tasks cannot be compared",
    "training.max_length": "it decides which held-out examples are left out",
    "evaluation": "it changes nothing that is trained",
    "search": "it is the search itself",
}


def recipe_at(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the point's values, and without its search.

    Raises:
        InvalidRecipe: these values do not go together.
    """
    tree = copy.deepcopy(recipe_dict(recipe))
    del tree["search"]
    for key, value in point.items():
        *groups, last = key.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[last] = value
    return build_recipe(tree)


def check_space(recipe: Recipe) -> None:
    """Check that every key may be searched and that every value can be part of a recipe.

    A value that only goes together with another key's value (``quantization: nf4`` with ``name: qlora``)
    is fine as long as the space has that one.

    Raises:
        InvalidRecipe: it names the key, the value and the nearest valid key.
    """
    dimensions = recipe.search.dimensions
    for one in dimensions:
        hint = _searchable_type(one.key)
        if not one.choices and hint not in (int, float):
            raise InvalidRecipe(
                f"search.space.{one.key} is a range, but '{one.key}' is no number; list its choices."
            )
        if not one.choices and hint is int and not (one.low.is_integer() and one.high.is_integer()):
            raise InvalidRecipe(
                f"search.space.{one.key}: low and high are {one.low:g} and {one.high:g}, but "
                f"'{one.key}' is a whole number."
            )
    for one in dimensions:
        for value in one.ends:
            _check_value(recipe, one, typed(one, value), dimensions)


def typed(dimension: Dimension, value: Any) -> Any:
    """Return a number of a range in the type of its key; other values as they are."""
    if dimension.choices:
        return value
    return int(value) if is_whole(dimension) else float(value)


def is_whole(dimension: Dimension) -> bool:
    """Whether the key takes whole numbers."""
    return _searchable_type(dimension.key) is int


def searchable_keys() -> list[str]:
    """Return every key that may be searched."""
    return [key for key in _types(Recipe, "") if not _reason(key)]


def _check_value(
    recipe: Recipe, dimension: Dimension, value: Any, dimensions: tuple[Dimension, ...]
) -> None:
    """Build the recipe with the value alone, else with one value of one other key."""
    try:
        recipe_at(recipe, {dimension.key: value})
    except InvalidRecipe as error:
        others = [one for one in dimensions if one is not dimension]
        pairs = ((one.key, typed(one, end)) for one in others for end in one.ends)
        if not any(_is_recipe(recipe, {dimension.key: value, key: end}) for key, end in pairs):
            raise InvalidRecipe(f"search.space.{dimension.key}: {error}") from error


def _is_recipe(recipe: Recipe, point: Mapping[str, Any]) -> bool:
    try:
        recipe_at(recipe, point)
    except InvalidRecipe:
        return False
    return True


def _searchable_type(key: str) -> Any:
    """Return the type of a key that may be searched.

    Raises:
        InvalidRecipe: no such key, or one that may not be searched.
    """
    types = _types(Recipe, "")
    if key not in types:
        known = searchable_keys()
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise InvalidRecipe(
            f"recipe key 'search.space.{key}' is unknown. Did you mean '{near}'? Keys that may be "
            f"searched: {', '.join(known)}."
        )
    reason = _reason(key)
    if reason:
        raise InvalidRecipe(f"'{key}' may not be searched: {reason}. Remove it from search.space.")
    return types[key]


def _reason(key: str) -> str:
    """Say why a key may not be searched; empty if it may."""
    if key in _ALLOWED:
        return ""
    return _REFUSED.get(key) or _REFUSED.get(key.partition(".")[0], "")


def _types(cls: type[Any], prefix: str) -> dict[str, Any]:
    """Return the type of every key below a recipe class, by dotted name."""
    return dict(_walk(cls, prefix))


def _walk(cls: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        hint = hints[spec.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast("type[Any]", hint), f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", hint
