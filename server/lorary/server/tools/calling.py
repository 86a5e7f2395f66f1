"""The tools of one call, from its fields to its answers."""

from __future__ import annotations

import hashlib
import secrets
import string
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorary.server.engine.request import Constraint
from lorary.server.tools.grammar import call_grammar
from lorary.server.tools.reader import CallReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.engine.request import Sampling
    from lorary.server.tools.definitions import Toolset
    from lorary.server.tools.form import Form

_LETTERS = string.digits + string.ascii_letters
_SHORT = 9


@dataclass(frozen=True, slots=True)
class Calling:
    """A call's tools, in the form of its base."""

    toolset: Toolset
    form: Form

    def constrained(self, sampling: Sampling) -> Sampling:
        """Return how answers are chosen: free, or calls that fit; a task's stop strings end neither."""
        return replace(
            sampling,
            constraint=Constraint("lark", call_grammar(self.toolset, self.form)),
            shown_ids=self.form.shown_ids,
        )

    def reader(self) -> CallReader:
        """Return what reads one answer."""
        names = [tool.name for _, tool in self.toolset.callable]
        return CallReader(self.form.format, names, new_call_id)


def new_call_id() -> str:
    """Return an id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


def with_short_ids(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return turns whose calls have ids of nine letters and digits, as some templates demand.

    The same id is the same short one everywhere: it is a hash.
    """
    shortened = []
    for turn in turns:
        new = dict(turn)
        if "tool_calls" in new:
            new["tool_calls"] = [{**call, "id": _short(call["id"])} for call in new["tool_calls"]]
        if "tool_call_id" in new:
            new["tool_call_id"] = _short(new["tool_call_id"])
        shortened.append(new)
    return shortened


def _short(call_id: str) -> str:
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest())
    digits = []
    for _ in range(_SHORT):
        number, digit = divmod(number, len(_LETTERS))
        digits.append(_LETTERS[digit])
    return "".join(digits)
