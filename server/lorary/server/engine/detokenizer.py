"""Token ids to text pieces that never split a character and never show part of a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers.decoders import ByteLevel, DecodeStream

if TYPE_CHECKING:
    from collections.abc import Sequence

_BROKEN = "\ufffd"
"""Stands for bytes that are no whole character; the next token may complete them."""


class Detokenizer:
    """Makes text streams of one vocabulary.

    A byte-level vocabulary's tokens are bytes that are joined, so that where no character is open a
    token's text is the same everywhere: it is decoded once and looked up from then on.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        # Token id to its text; "" where nothing is shown of it, None where it ends within a character.
        is_byte_level = isinstance(backend.decoder, ByteLevel)
        self._texts: dict[int, str | None] | None = {} if is_byte_level else None

    def stream(self, stop: Sequence[str], shown_ids: Sequence[int] = ()) -> TextStream:
        """Return the stream of a new answer that any of the strings ``stop`` ends.

        Its text shows the special tokens ``shown_ids`` and no others.
        """
        return TextStream(self._backend, stop, self._texts, shown_ids)


class TextStream:
    """The text of one answer, as it grows.

    Text is held back while it could be the beginning of a stop string.

    Attributes:
        matched_stop: the stop string that ended the answer, or "".
    """

    __slots__ = (
        "_backend",
        "_ids",
        "_longest",
        "_num_held",
        "_open",
        "_pieces",
        "_shown",
        "_start",
        "_stop",
        "_stream",
        "_texts",
        "matched_stop",
    )

    def __init__(
        self,
        backend: Any,
        stop: Sequence[str],
        texts: dict[int, str | None] | None = None,
        shown_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._shown = {i: backend.id_to_token(i) for i in shown_ids}
        self._stop = tuple(stop)
        self._longest = max((len(s) for s in stop), default=0)
        self._texts = {} if texts is None else texts
        # Of a byte-level vocabulary, the tokens since the last whole character; others keep a stream.
        self._open: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True) if texts is None else None
        # Tokens since the last one that was shown for itself, and how much text stood before them.
        self._ids: list[int] = []
        self._start = 0
        # What was decoded, in parts: joining it for every token would copy all of it each time. Of its
        # end so many characters are held back.
        self._pieces: list[str] = []
        self._num_held = 0
        self.matched_stop = ""

    @property
    def text(self) -> str:
        """Everything released so far."""
        decoded = self._decoded
        return decoded[: len(decoded) - self._num_held]

    @property
    def _decoded(self) -> str:
        if len(self._pieces) != 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_id: int) -> str:
        """Take one token; return new text, often empty. After a match, nothing more is taken."""
        # Most often: no character is open, and what the token shows is known.
        piece = None if self._open or self._shown else self._texts.get(token_id)
        if piece is None:
            piece = self._decode(token_id)
        else:
            self._ids.append(token_id)
        if not piece:
            return ""
        if self._stop:
            return self._release(piece)
        self._pieces.append(piece)
        return piece

    def _decode(self, token_id: int) -> str | None:
        """Return the text that a token completes, if it does."""
        if token_id in self._shown:
            return self._show(token_id)
        self._ids.append(token_id)
        if self._stream is None:
            return self._joined(token_id)
        piece: str | None = self._stream.step(self._backend, token_id)
        return piece

    def _show(self, token_id: int) -> str:
        """Return a special token's own text, behind what was open of a character."""
        piece: str = self._rest() + self._shown[token_id]
        self._open.clear()
        self._ids.clear()
        if self._stream is not None:
            self._stream = DecodeStream(skip_special_tokens=True)
        self._start = len(self._decoded) + len(piece)
        return piece

    def _rest(self) -> str:
        """Return what a decode of the tokens as a whole has behind the text so far.

        A character that was cut off shows as its replacement character.
        """
        whole: str = self._backend.decode(self._ids, skip_special_tokens=True)
        known = self._decoded[self._start :]
        return whole[len(known) :] if whole.startswith(known) else ""

    def _joined(self, token_id: int) -> str | None:
        """Return the text that a token of a byte-level vocabulary completes."""
        texts = self._texts
        if not self._open and token_id in texts:
            text = texts[token_id]
            if text is None:
                self._open.append(token_id)
            return text
        is_first = not self._open
        self._open.append(token_id)
        text = self._backend.decode(self._open, skip_special_tokens=True)
        if text.endswith(_BROKEN):
            text = None
        else:
            self._open.clear()
        if is_first:
            texts[token_id] = text
        return text

    def finish(self) -> str:
        """Return what was held back: the answer ends without a stop string."""
        if self.matched_stop:
            return ""
        first = len(self._decoded) - self._num_held
        self._pieces.append(self._rest())
        self._num_held = 0
        return self._decoded[first:]

    def _release(self, piece: str) -> str:
        decoded = self._decoded
        search_from = max(0, len(decoded) - self._longest + 1)
        first = len(decoded) - self._num_held
        self._pieces.append(piece)
        decoded = self._decoded
        found = [
            (position, s) for s in self._stop if (position := decoded.find(s, search_from)) >= 0
        ]
        if found:
            # Text released before cannot reach into the match: its beginning was held back.
            until, self.matched_stop = min(found)
        else:
            until = len(decoded) - self._held_back(decoded)
        self._num_held = len(decoded) - until
        return decoded[first:until]

    def _held_back(self, decoded: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(decoded)), 0, -1):
            tail = decoded[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
