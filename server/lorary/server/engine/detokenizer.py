"""Token ids to text pieces that never split a character and never show part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from collections.abc import Sequence


class TextStream:
    """The text of one answer, as it grows.

    Text is held back while it could be the beginning of a stop string.

    Attributes:
        text: everything released so far.
        matched_stop: the stop string that ended the answer, or "".
    """

    def __init__(self, backend: Any, stop: Sequence[str]) -> None:
        self._backend = backend
        self._stop = tuple(stop)
        self._longest = max((len(s) for s in stop), default=0)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""
        self.text = ""
        self.matched_stop = ""

    def push(self, token_id: int) -> str:
        """Take one token; return new text, often empty. After a match, nothing more is taken."""
        self._ids.append(token_id)
        piece = self._stream.step(self._backend, token_id)
        return self._release(piece) if piece else ""

    def finish(self) -> str:
        """Return what was held back: the answer ends without a stop string."""
        if self.matched_stop:
            return ""
        # A character cut off by the end of the answer shows as its replacement character, as in a
        # decode of the whole.
        whole: str = self._backend.decode(self._ids, skip_special_tokens=True)
        if whole.startswith(self._decoded):
            self._decoded = whole
        rest = self._decoded[len(self.text) :]
        self.text = self._decoded
        return rest

    def _release(self, piece: str) -> str:
        search_from = max(0, len(self._decoded) - self._longest + 1)
        self._decoded += piece
        found = [
            (position, s)
            for s in self._stop
            if (position := self._decoded.find(s, search_from)) >= 0
        ]
        if found:
            position, self.matched_stop = min(found)
            # Text released before cannot reach into the match: its beginning was held back.
            released, self.text = self._decoded[len(self.text) : position], self._decoded[:position]
            return released
        held = self._held_back()
        until = len(self._decoded) - held
        released, self.text = self._decoded[len(self.text) : until], self._decoded[:until]
        return released

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._decoded)), 0, -1):
            tail = self._decoded[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
