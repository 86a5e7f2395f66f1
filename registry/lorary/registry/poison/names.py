"""Names of adapters that may not be: as a path, a pattern, a look-alike, or only by their length."""

from __future__ import annotations

from typing import Final

HOSTILE_NAMES: Final[dict[str, str]] = {
    "climbs": "../../etc/passwd",
    "climbs-inside": "team/../../x",
    "climbs-encoded": "..%2f..%2fx",
    "absolute": "/etc/passwd",
    "home": "~root",
    "backslashes": "..\\..\\x",
    "drive": "C:\\x",
    "dot": ".",
    "two-dots": "..",
    "hidden": ".git",
    "ends-in-a-dot": "sentiment.",
    "nul": "sentiment\0",
    "newline": "sentiment\nprod",
    "terminal-codes": "\x1b[2Ksentiment",
    "spaces": "sentiment prod",
    "option": "--registry=x",
    "shell": "$(id)",
    "pattern": "senti*",
    "query": "sentiment?x=1#y",
    "two-slashes": "team/nlp/sentiment",
    "empty-team": "/sentiment",
    "empty-name": "team/",
    "empty": "",
    "capital": "Sentiment",
    "cyrillic": "sentim\N{CYRILLIC SMALL LETTER IE}nt",
    "full-width": "\N{FULLWIDTH LATIN SMALL LETTER S}entiment",
    "accent": "se\N{COMBINING ACUTE ACCENT}ntiment",
    "zero-width": "senti\N{ZERO WIDTH SPACE}ment",
    "right-to-left": "\N{RIGHT-TO-LEFT OVERRIDE}tnemitnes",
    "half-a-character": "sentiment\ud800",
    "300-characters": "s" * 300,
}
"""What it is, and the name. ``lorary.registry.refs.check_name`` refuses each as ``InvalidRef``."""
