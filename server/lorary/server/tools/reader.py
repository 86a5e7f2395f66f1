"""From an answer's text, as it grows, to its content and its calls.

The grammar (``lorary.server.tools.grammar``) makes what begins as a call become one. The reader does not lean on
that: what begins as a call and goes on as something else is content, whole.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from lorary.server.tools.form import Format

_SPACE = re.compile(r"\s*")
_NAME: Final = "name"


@dataclass(slots=True, kw_only=True)
class Call:
    """A call, as far as it has come; ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str = ""
    is_whole: bool = False


@dataclass(slots=True, kw_only=True)
class CallPiece:
    """New parts of one call; ``id`` and ``name`` are in its first only."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True, kw_only=True)
class Piece:
    """What a piece of an answer's text says."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class _Partial(Exception):
    """What came so far may still become it."""


class _Other(Exception):
    """It is something else."""


class CallReader:
    """Reads one answer.

    Args:
        found: how its model writes calls.
        names: of the functions that exist.
        new_id: makes the id of a call.

    Attributes:
        content: the text so far, without its calls.
        calls: the calls so far, in order.
    """

    def __init__(self, found: Format, names: Collection[str], new_id: Callable[[], str]) -> None:
        self.content = ""
        self.calls: list[Call] = []
        self._format = found
        self._names = {json.dumps(name): name for name in names}
        self._new_id = new_id
        self._held = ""
        self._spaces = ""
        self._depth = 0
        self._is_in_string = self._is_escaped = False
        self._step: Callable[[Piece], bool]
        self._step = self._read_text if found.begin else self._read_head

    def push(self, text: str, *, is_last: bool = False) -> Piece:
        """Take more text; return what it says, which may be nothing before the last."""
        piece = Piece()
        self._held += text
        while self._step(piece):
            pass
        if is_last:
            self._finish(piece)
        self.content += piece.content
        return piece

    def _finish(self, piece: Piece) -> None:
        """Tell what was held back, but for the end of a call that was cut off in it."""
        if self._step in (self._read_text, self._read_head):
            self._say(piece, self._held)
        self._held = ""
        if not self.calls:
            piece.content += self._spaces

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and none is cut off."""
        return bool(self.calls) and all(call.is_whole for call in self.calls)

    # Each of these reads what it can of the held text, and says whether the next one has anything to do.

    def _read_text(self, piece: Piece) -> bool:
        begin = self._format.begin
        place = self._held.find(begin)
        if place >= 0:
            self._say(piece, self._held[:place])
            self._held = self._held[place:]
            self._step = self._read_head
            return True
        kept = next(
            (
                n
                for n in range(min(len(begin) - 1, len(self._held)), 0, -1)
                if self._held.endswith(begin[:n])
            ),
            0,
        )
        cut = len(self._held) - kept
        self._say(piece, self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _read_head(self, piece: Piece) -> bool:
        """From a call's begin to its arguments' brace."""
        found = self._format
        return self._read_item(piece, (found.begin, "[" if found.is_list else ""))

    def _read_next(self, piece: Piece) -> bool:
        """From the comma behind a call of a list to the next one's arguments' brace."""
        return self._read_item(piece, (",",))

    def _read_item(self, piece: Piece, before: tuple[str, ...]) -> bool:
        parts = (*before, "{", '"name"', ":", _NAME, ",", f'"{self._format.arguments}"', ":", "{")
        try:
            at, name = self._match(parts)
        except _Partial:
            return False
        except _Other:
            self._give_up(piece)
            return True
        call = Call(id=self._new_id(), name=name)
        piece.calls.append(CallPiece(index=len(self.calls), id=call.id, name=name))
        self.calls.append(call)
        self._held = self._held[at - 1 :]
        self._step = self._read_arguments
        return True

    def _read_arguments(self, piece: Piece) -> bool:
        end = self._end_of_object()
        call = self.calls[-1]
        said, self._held = self._held[:end], self._held[end:]
        if said:
            call.arguments += said
            last = piece.calls[-1] if piece.calls else None
            if last is None or last.index != len(self.calls) - 1:
                last = CallPiece(index=len(self.calls) - 1)
                piece.calls.append(last)
            last.arguments += said
        if self._depth:
            return False
        call.is_whole = True
        self._step = self._read_end
        return True

    def _read_end(self, piece: Piece) -> bool:
        """Behind a call: the next one of its list, or its end."""
        found = self._format
        try:
            at, _ = self._match(("}",))
            if found.is_list and self._held[at:].lstrip()[:1] == ",":
                self._held = self._held[at:]
                self._step = self._read_next
                return True
            at, _ = self._match(("}", "]" if found.is_list else "", found.end))
        except _Partial:
            return False
        except _Other:
            at = 0
        self._held = self._held[at:]
        self._step = self._read_text if found.begin else self._read_rest
        return True

    def _read_rest(self, piece: Piece) -> bool:
        self._say(piece, self._held)
        self._held = ""
        return False

    def _give_up(self, piece: Piece) -> None:
        """Tell as content what looked like a call."""
        if not self._format.begin:
            self._step = self._read_rest
            return
        # Its mark is text; there may be another one behind it.
        self._say(piece, self._held[:1])
        self._held = self._held[1:]
        self._step = self._read_text

    def _match(self, parts: tuple[str, ...]) -> tuple[int, str]:
        """Return where ``parts``, with white space between, end in the held text, and the name among them.

        Raises:
            _Partial: more text may complete them.
            _Other: none can.
        """
        held, at, name = self._held, 0, ""
        for part in parts:
            if not part:
                continue
            space = _SPACE.match(held, at)
            at = space.end() if space else at
            wanted = tuple(self._names) if part == _NAME else (part,)
            found = next((one for one in wanted if held.startswith(one, at)), None)
            if found is None:
                if any(one.startswith(held[at:]) for one in wanted):
                    raise _Partial
                raise _Other
            if part == _NAME:
                name = self._names[found]
            at += len(found)
        return at, name

    def _end_of_object(self) -> int:
        """Return how much of the held text belongs to the arguments; their depth is 0 once they end."""
        for i, char in enumerate(self._held):
            if self._is_in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._is_in_string = False
            elif char == '"':
                self._is_in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return i + 1
        return len(self._held)

    def _say(self, piece: Piece, text: str) -> None:
        """Tell content; white space waits for what follows, and beside calls alone it is nothing."""
        text = self._spaces + text
        said = text.rstrip()
        self._spaces = text[len(said) :]
        if self.calls and not (self.content + piece.content):
            said = said.lstrip()
        piece.content += said
