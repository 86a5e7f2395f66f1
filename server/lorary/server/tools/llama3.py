"""Llama 3.1 to 3.3: one call, as JSON, is the whole answer."""

from __future__ import annotations

from lorary.server.tools.form import Format

FORMAT = Format(name="llama3", begin="", end="", arguments="parameters")
