"""Completion of refs in bash, which takes ``sentiment@pr`` for three words: ``sentiment``, ``@`` and ``pr``.

``@`` is one of bash's COMP_WORDBREAKS. So the words are joined before the command reads them, and what it
answers is cut to what bash is about to replace: what follows the ``@``.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def whole_refs(prog_name: str) -> Iterator[None]:
    """Let the block answer a bash that asks for completions as if ``@`` broke no words.

    Does nothing unless this process is asked. COMP_WORDS and COMP_CWORD of the environment are changed.
    """
    asked = f"_{prog_name.replace('-', '_').upper()}_COMPLETE"
    if os.environ.get(asked) != "complete_bash" or "COMP_WORDS" not in os.environ:
        yield
        return
    # The script joins the array with newlines; others may use spaces.
    raw, index = os.environ["COMP_WORDS"], int(os.environ.get("COMP_CWORD", "0"))
    words, index, cut = joined(raw.split("\n" if "\n" in raw else " "), index)
    os.environ["COMP_WORDS"] = "\n".join(words)
    os.environ["COMP_CWORD"] = str(index)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            os.write(1, f"{line[cut:]}\n".encode())


def joined(words: Sequence[str], index: int) -> tuple[list[str], int, int]:
    """Return words with refs in one piece, the index of the current one, and its characters before ``@``.

    Args:
        words: as bash broke them.
        index: of the word with the cursor.
    """
    found: list[str] = []
    current, cut = index, 0
    for place, word in enumerate(words):
        is_more = bool(found) and (word == "@" or found[-1].endswith("@"))
        # A word that begins a line, or an option, is no part of a ref.
        if is_more and len(found) > 1 and not found[-1].startswith("-"):
            found[-1] += word
        else:
            found.append(word)
        if place == index:
            current = len(found) - 1
            cut = found[-1].rfind("@") + 1
    if index >= len(words):  # nothing is typed yet after the last word
        current = len(found)
    return found, current, cut
