"""Which files of a model's folder are its tokenizer's."""

from __future__ import annotations

from typing import Final

TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Those there may be. A base's fingerprint is over them: another name here is another fingerprint."""
