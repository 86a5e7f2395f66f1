"""The ``search`` section of a recipe: which keys are searched, over what, and how.

A sample::

    search:
      space:
        method.rank: [4, 8, 16]                                      # one of these
        method.target_modules: [[all-linear], [q_proj, v_proj]]
        training.learning_rate: {low: 1e-4, high: 1e-2, log: true}   # anything between
      sampler: tpe
      pruner: median
      trials: 20

This module knows the section's own form; whether the keys and values fit the recipe is ``points``' affair.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lorary.errors import InvalidRecipe

DEFAULT_TRIALS = 20
MAX_GRID = 10_000
_RANGE_KEYS = ("choices", "low", "high", "log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """What one recipe key may be: one of ``choices``, or a number from ``low`` to ``high``.

    Attributes:
        key: dotted, such as ``method.rank``.
        choices: values as YAML has them; empty for a range.
        log: draw the logarithm evenly, and not the number.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or the two ends of the range."""
        return self.choices or (self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecipe:
    """How ``lorary search`` looks for better values of other keys; training ignores it."""

    space: dict[str, Any] = field(default_factory=dict)
    """Dotted recipe key to a list of choices, or to ``{low, high, log}``."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Who chooses the next trial; ``grid`` takes every combination, and needs lists."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Who ends a trial early, by its validation losses so far."""
    trials: int = 0
    """How many; 0 is 20, and all combinations of a grid."""
    startup_trials: int = 5
    """The first trials are drawn at random (tpe) and never pruned (median)."""
    seed: int = 0
    """Of the sampler."""

    def __post_init__(self) -> None:
        for name, low, high in (("trials", 0, 100_000), ("startup_trials", 1, 100_000)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidRecipe(
                    f"search.{name} is {value}; it must be between {low} and {high}."
                )
        if not 0 <= self.seed < 2**32:
            raise InvalidRecipe(f"search.seed is {self.seed}; it must be between 0 and 2^32 - 1.")
        dimensions = self.dimensions
        if self.sampler == "grid" and dimensions:
            self._check_grid(dimensions)

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The space, in the recipe's order.

        Raises:
            InvalidRecipe: an entry is neither a list nor a sound range.
        """
        return tuple(_dimension(key, raw) for key, raw in self.space.items())

    @property
    def num_trials(self) -> int:
        """``trials`` with its default resolved."""
        if self.sampler == "grid":
            return math.prod(len(one.choices) for one in self.dimensions)
        return self.trials or DEFAULT_TRIALS

    def _check_grid(self, dimensions: tuple[Dimension, ...]) -> None:
        for one in dimensions:
            if not one.choices:
                raise InvalidRecipe(
                    f"search.space.{one.key} is a range, and a grid needs values; list them, as in "
                    f"[{one.low:g}, {one.high:g}], or set search.sampler to tpe."
                )
        size = self.num_trials
        if size > (self.trials or MAX_GRID):
            raise InvalidRecipe(
                f"the grid of search.space has {size} combinations, and search.trials allows "
                f"{self.trials or MAX_GRID}. Raise it, shorten the lists, or set search.sampler to "
                "random."
            )


def _dimension(key: str, raw: Any) -> Dimension:
    """Read one entry of the space."""
    where = f"search.space.{key}"
    if isinstance(raw, (list, tuple)):
        return Dimension(key=key, choices=_choices(raw, where))
    if not isinstance(raw, dict):
        raise InvalidRecipe(
            f"{where} is {raw!r}; it must be a list of choices, or a range such as "
            "{low: 1e-4, high: 1e-2, log: true}."
        )
    for name in raw:
        if name not in _RANGE_KEYS:
            near = difflib.get_close_matches(str(name), _RANGE_KEYS, n=1, cutoff=0.0)[0]
            raise InvalidRecipe(
                f"recipe key '{where}.{name}' is unknown. Did you mean '{near}'? Valid keys: "
                f"{', '.join(_RANGE_KEYS)}."
            )
    if "choices" in raw:
        if len(raw) > 1:
            raise InvalidRecipe(f"{where} has choices and a range; keep one of them.")
        return Dimension(key=key, choices=_choices(raw["choices"], where))
    return _range(key, raw, where)


def _choices(raw: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(raw, (list, tuple)) or not raw:
        raise InvalidRecipe(f"{where} is {raw!r}; it must be a list with at least one choice.")
    written = [json.dumps(value, sort_keys=True, default=str) for value in raw]
    if len(set(written)) < len(written):
        raise InvalidRecipe(f"{where} repeats a choice: {list(raw)}.")
    return tuple(raw)


def _range(key: str, raw: dict[str, Any], where: str) -> Dimension:
    for name in ("low", "high"):
        if name not in raw:
            raise InvalidRecipe(f"{where} lacks '{name}'; a range has low and high.")
    low, high = (_number(raw[name], f"{where}.{name}") for name in ("low", "high"))
    log = raw.get("log", False)
    if not isinstance(log, bool):
        raise InvalidRecipe(f"{where}.log is {log!r}; it must be true or false.")
    if not low < high:
        raise InvalidRecipe(f"{where}: low is {low:g} and high {high:g}; low must be below high.")
    if log and low <= 0:
        raise InvalidRecipe(f"{where}: low is {low:g} with log: true; it must be above 0.")
    return Dimension(key=key, low=low, high=high, log=log)


def _number(value: Any, where: str) -> float:
    """Read a finite number; YAML reads ``1e-4`` as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRecipe(f"{where} is {value!r}; it must be a number.")
    return number
