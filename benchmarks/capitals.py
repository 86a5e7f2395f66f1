"""Real labelled rows for ``token_classification``: which words of a news sentence stand with a capital letter.

No package carries a tagged corpus. These labels are exact, because they are read off the text before it
is put into lower case; what they mark is mostly names. The first word of a sentence, whose capital says nothing,
is left out, and so are sentences with signs outside ASCII, which the corpus has damaged.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from lorary.trainer.recipe import DataRecipe
from lorary.trainer.sources import read_examples

if TYPE_CHECKING:
    from pathlib import Path

LABELS = ("O", "B-CAP", "I-CAP")
_WORDS = range(8, 41)


def write_rows(path: Path) -> None:
    """Write the second sentence of every news article to ``path``, a .jsonl with ``text`` and ``target``."""
    articles = read_examples(DataRecipe(source="news-headlines"))
    with path.open("w", encoding="utf-8") as file:
        for article in articles:
            sentences = re.split(r"(?<=[.!?])\s+", article.inputs["text"])
            words = sentences[1].split()[1:] if len(sentences) > 1 else []
            if len(words) in _WORDS and all(map(str.isascii, words)):
                row = {"text": " ".join(words).lower(), "target": " ".join(labels_of(words))}
                file.write(json.dumps(row) + "\n")


def labels_of(words: list[str]) -> list[str]:
    """Return a label for each word; capitalised words in a row are one span, unless a sign parts them."""
    labels = []
    is_inside = False
    for word in words:
        if word.lstrip("\"'([")[:1].isupper():
            labels.append("I-CAP" if is_inside else "B-CAP")
            is_inside = word[-1].isalnum()
        else:
            labels.append("O")
            is_inside = False
    return labels
