"""Hermes, Qwen 2.5 and 3, SmolLM3 and many others: each call as JSON in a pair of tags."""

from __future__ import annotations

from lorary.server.tools.form import Format

FORMAT = Format(name="hermes", begin="<tool_call>", end="</tool_call>")
