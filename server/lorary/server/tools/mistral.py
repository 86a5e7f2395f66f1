"""Mistral 7B v0.3, Nemo and others of their time: a list of calls behind a mark of their own."""

from __future__ import annotations

from lorary.server.tools.form import Format

FORMAT = Format(name="mistral", begin="[TOOL_CALLS]", end="", is_list=True, has_short_ids=True)
