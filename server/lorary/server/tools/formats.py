"""The formats that are known, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorary.server.tools import hermes, llama3, mistral

if TYPE_CHECKING:
    from lorary.server.tools.form import Format

FORMATS: dict[str, Format] = {one.FORMAT.name: one.FORMAT for one in (hermes, llama3, mistral)}
