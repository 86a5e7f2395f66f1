"""Read single values of an ``adapter_config.json``: types and ranges, with the value in the message.

Each raises ``CorruptArtifact`` for what is not of its kind; they decide nothing about meanings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from lorary.errors import CorruptArtifact
from lorary.registry.strict_json import show

_MAX_MODULE_LIST: Final = 20_000
_MAX_TEXT: Final = 1024
MAX_INVOCATION: Final = 512
"""Most tokens of an invocation; published ones have fewer than twenty."""
_MAX_LAYERS: Final = 4096
_MAX_LAYER_PATTERNS: Final = 16
_LAYERS_PATTERN: Final = re.compile(r"[A-Za-z0-9_.]{1,100}")


def whole(config: Mapping[str, Any], key: str) -> int:
    """Return a whole number."""
    value = config.get(key)
    if type(value) is not int:
        raise CorruptArtifact(
            f"adapter_config.json has {key} {shown(value)}; a whole number is needed"
        )
    return value


def positive(where: str, value: Any) -> float:
    """Return a positive number; ``where`` names it in the message."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CorruptArtifact(
            f"adapter_config.json has {where} {shown(value)}; a positive number is needed"
        )
    return float(min(value, 1e300))


def numbers(config: Mapping[str, Any], key: str, *, whole: bool) -> dict[str, float]:
    """Return an object of positive numbers, or of whole ones; empty if there is none."""
    raw = config.get(key)
    if raw is None:
        return {}
    if not isinstance(raw, dict) or len(raw) > _MAX_MODULE_LIST:
        raise CorruptArtifact(f"adapter_config.json has {key} {shown(raw)}; an object is needed")
    if whole and any(type(value) is not int for value in raw.values()):
        raise CorruptArtifact(f"adapter_config.json has {key} with a rank that is no whole number")
    if any(len(name) > _MAX_TEXT for name in raw):
        raise CorruptArtifact(
            f"adapter_config.json has {key} with a key over {_MAX_TEXT} characters"
        )
    if whole:
        return dict(raw)
    return {name: positive(f"{key}[{show(name)}]", value) for name, value in raw.items()}


def modules(config: Mapping[str, Any], key: str, *, is_needed: bool) -> str | tuple[str, ...]:
    """Return module names: a list, or one pattern."""
    raw = config.get(key)
    if not raw and not is_needed:
        return ()
    if isinstance(raw, str) and 0 < len(raw) <= _MAX_TEXT:
        return raw
    if isinstance(raw, list) and 0 < len(raw) <= _MAX_MODULE_LIST and _are_texts(raw):
        return tuple(raw)
    raise CorruptArtifact(
        f"adapter_config.json has {key} {shown(raw)}; a list of module names is needed"
    )


def layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the numbers of layers; ``None`` for all."""
    raw = config.get("layers_to_transform")
    if raw is None or raw == []:
        return None
    values = raw if isinstance(raw, list) else [raw]
    if len(values) > _MAX_LAYERS or not all(
        type(v) is int and 0 <= v < _MAX_LAYERS for v in values
    ):
        raise CorruptArtifact(
            f"adapter_config.json has layers_to_transform {shown(raw)}; whole numbers are needed, "
            f"each below {_MAX_LAYERS}"
        )
    return tuple(values)


def layers_pattern(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that stand before a layer's number."""
    raw = config.get("layers_pattern")
    if not raw:
        return ()
    values = raw if isinstance(raw, list) else [raw]
    if len(values) > _MAX_LAYER_PATTERNS or not all(
        isinstance(v, str) and _LAYERS_PATTERN.fullmatch(v) for v in values
    ):
        raise CorruptArtifact(
            f"adapter_config.json has layers_pattern {shown(raw)}; module names are needed"
        )
    return tuple(values)


def invocation_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return aLoRA's invocation tokens; empty if there are none."""
    raw = config.get("alora_invocation_tokens")
    if not raw:
        return ()
    if (
        not isinstance(raw, list)
        or len(raw) > MAX_INVOCATION
        or not all(type(v) is int and v >= 0 for v in raw)
    ):
        raise CorruptArtifact(
            f"adapter_config.json has alora_invocation_tokens {shown(raw)}; a list of at most "
            f"{MAX_INVOCATION} token ids is needed"
        )
    return tuple(raw)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """Return a truth value, false if there is none."""
    value = config.get(key, False)
    if type(value) is not bool:
        raise CorruptArtifact(
            f"adapter_config.json has {key} {shown(value)}; true or false is needed"
        )
    return value


def text(config: Mapping[str, Any], key: str) -> str | None:
    """Return a short printable text."""
    value = config.get(key)
    if value is None or (
        isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()
    ):
        return value
    raise CorruptArtifact(f"adapter_config.json has {key} {shown(value)}; text is needed")


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(v, str) and 0 < len(v) <= _MAX_TEXT for v in values)


def shown(value: Any) -> str:
    """Return a foreign value fit for a message."""
    return show(value) if isinstance(value, str) else show(repr(value)).strip("'\"")
