"""JSON from strangers: parsed strictly, and names from it made fit to be printed."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from lorary.errors import CorruptArtifact

if TYPE_CHECKING:
    from collections.abc import Iterator

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate keys, no NaN, no deep nesting.

    Raises:
        CorruptArtifact: it is anything else; the message starts with ``what``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            double = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CorruptArtifact(f"{what} has the key {show(double)} twice")
        return found

    def constant(text: str) -> Any:
        raise CorruptArtifact(f"{what} contains {text}, which is not JSON")

    try:
        if _SURROGATE.search(raw):
            # Half a character: Python reads it, and nothing can write it again.
            json.dumps(json.loads(raw), ensure_ascii=False).encode()
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{what} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CorruptArtifact(f"{what} is a JSON {type(parsed).__name__}; it must be an object")
    return parsed


def numbered_lines(raw: bytes, where: str) -> Iterator[tuple[bytes, str]]:
    """Yield every line of a log, and what to call it in a message.

    A last line without a newline was never acknowledged and is skipped.
    """
    *lines, _torn = raw.split(b"\n")
    for number, line in enumerate(lines, start=1):
        yield line, f"line {number} of {where}"


def show(name: str) -> str:
    """Return a foreign name fit for a message: quoted, escaped, cut."""
    shown = ascii(name)
    return shown if len(shown) <= 120 else f"{shown[:117]}…'"
