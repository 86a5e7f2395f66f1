"""Which linear layers of a base are quantized, and how: a default, and rules by name.

A plan is a YAML or JSON file::

    default: int8
    rules:                        # the first that matches a layer decides
      - modules: "*.down_proj"    # a glob over full names, such as model.layers.0.mlp.down_proj
        format: none

It says nothing about embeddings, norms and the output head: they are never quantized.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import yaml

from lorary.bases.load import Quantization, linear_names
from lorary.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from lorary.bases.find import Base

FORMATS: tuple[Quantization, ...] = get_args(Quantization)


@dataclass(frozen=True, slots=True)
class Rule:
    """Layers whose full name matches the glob ``modules`` are kept in ``format``."""

    modules: str
    format: Quantization


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """How each linear layer is kept: the first rule that matches its name, else the default."""

    default: Quantization
    rules: tuple[Rule, ...] = ()

    def resolve(self, base: Base) -> dict[str, Quantization]:
        """Return the format of every linear layer of ``base``; reads no weights.

        Raises:
            ConfigError: a rule decides about no layer.
        """
        return self.formats(linear_names(base))

    def formats(self, names: Collection[str]) -> dict[str, Quantization]:
        """Return the format of each of these layers, in their order.

        Raises:
            ConfigError: a rule decides about none of them.
        """
        decided: dict[str, Quantization] = {}
        for number, rule in enumerate(self.rules, 1):
            matching = fnmatch.filter(names, rule.modules)
            if not matching:
                raise ConfigError(
                    f"rule {number} of the quantization plan, '{rule.modules}', matches no linear "
                    f"layer of this base.{_nearest(rule.modules, _patterns(names))} The output head "
                    "and embeddings are never quantized."
                )
            fresh = [name for name in matching if name not in decided]
            if not fresh:
                raise ConfigError(
                    f"rule {number} of the quantization plan, '{rule.modules}', decides nothing: "
                    "earlier rules match the same layers. Put it before them, or remove it."
                )
            decided |= dict.fromkeys(fresh, rule.format)
        return {name: decided.get(name, self.default) for name in names}


def read_plan(path: Path) -> QuantizationPlan:
    """Read a plan from a YAML or JSON file.

    Raises:
        ConfigError: it cannot be read, is no mapping, has an unknown key or format, or lacks one.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the quantization plan '{path}' cannot be read: {error}") from error
    return parse_plan(raw, f"'{path}'")


def parse_plan(raw: Any, where: str) -> QuantizationPlan:
    """Make a plan of what a file holds; ``where`` begins the messages.

    Raises:
        ConfigError: as ``read_plan``.
    """
    plan = _mapping(raw, where, needed=("default",), allowed=("default", "rules"))
    rules = plan.get("rules", [])
    if not isinstance(rules, list):
        raise ConfigError(f"{where}: rules is {rules!r}; it is a list of modules and format.")
    parsed = []
    for number, rule in enumerate(rules, 1):
        place = f"{where}, rule {number}"
        keys = ("modules", "format")
        found = _mapping(rule, place, needed=keys, allowed=keys)
        if not isinstance(found["modules"], str) or not found["modules"]:
            raise ConfigError(
                f"{place}: modules is {found['modules']!r}; it is a glob such as '*.down_proj'."
            )
        parsed.append(Rule(found["modules"], _format(found["format"], place, "format")))
    return QuantizationPlan(_format(plan["default"], where, "default"), tuple(parsed))


def _mapping(
    raw: Any, where: str, *, needed: tuple[str, ...], allowed: tuple[str, ...]
) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is {raw!r}; it is a mapping with {' and '.join(allowed)}.")
    for key in raw:
        if key not in allowed:
            raise ConfigError(
                f"{where} has the unknown key {key!r}; known are {', '.join(allowed)}."
                f"{_nearest(str(key), allowed)}"
            )
    for key in needed:
        if key not in raw:
            raise ConfigError(f"{where} lacks '{key}'; it must have {' and '.join(needed)}.")
    return raw


def _format(value: Any, where: str, key: str) -> Quantization:
    if not isinstance(value, str) or value not in FORMATS:
        raise ConfigError(
            f"{where}: {key} is {value!r}; it is one of {', '.join(FORMATS)}."
            f"{_nearest(str(value), FORMATS)}"
        )
    return value


def _patterns(names: Collection[str]) -> list[str]:
    """Return what a rule may have meant: full names, and every layer of one kind."""
    kinds = dict.fromkeys("*." + name.rpartition(".")[2] for name in names)
    return [*kinds, *names]


def _nearest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
