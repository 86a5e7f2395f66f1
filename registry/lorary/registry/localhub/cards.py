"""What a model card says about its repository: the YAML at the top of ``README.md``."""

from __future__ import annotations

from typing import Any, Final

import yaml

_FENCE: Final = "---"
MAX_CARD_BYTES: Final = 256 << 10


def read_metadata(text: str) -> dict[str, Any]:
    """Return a card's metadata; empty if it has none.

    Raises:
        ValueError: the YAML does not parse, or is no mapping.
    """
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != _FENCE:
        return {}
    try:
        end = next(i for i, line in enumerate(lines[1:], start=1) if line.strip() == _FENCE)
    except StopIteration:
        raise ValueError("the metadata does not end with a line of '---'") from None
    try:
        found = yaml.safe_load("\n".join(lines[1:end]))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"the metadata is no YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError("the metadata is no mapping")
    return found


def tags_of(metadata: dict[str, Any]) -> list[str]:
    """Return the tags by which a repository can be found."""
    tags = [str(tag) for tag in _many(metadata.get("tags"))]
    for key in ("library_name", "pipeline_tag"):
        tags.extend(str(value) for value in _many(metadata.get(key)))
    relation = metadata.get("base_model_relation")
    if relation is None and metadata.get("library_name") == "peft":
        relation = "adapter"
    for base in _many(metadata.get("base_model")):
        tags.append(f"base_model:{base}")
        if relation:
            tags.append(f"base_model:{relation}:{base}")
    for prefix, key in (("license", "license"), ("dataset", "datasets"), ("language", "language")):
        tags.extend(f"{prefix}:{value}" for value in _many(metadata.get(key)))
    return list(dict.fromkeys(tags))


def _many(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
