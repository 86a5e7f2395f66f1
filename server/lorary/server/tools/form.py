"""How a family of models writes tool calls, as data: grammars and readers are made from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way of writing calls; between its parts there may be white space.

    ::

        begin {"name": "look", "arguments": {"at": 3}} end
        begin [{"name": "look", "arguments": {}}, {"name": "wait", "arguments": {}}] end    (is_list)

    Attributes:
        name: what ``--tool-format`` calls it.
        begin: what stands before a call and nowhere else; empty where a call is the whole answer.
        end: what stands behind it; may be empty.
        arguments: what the member is called that holds a call's arguments.
        is_list: whether calls are the items of one list; else each one has its own begin and end.
        has_short_ids: whether templates take ids of exactly nine letters and digits only.
    """

    name: str
    begin: str
    end: str
    arguments: str = "arguments"
    is_list: bool = False
    has_short_ids: bool = False

    @property
    def may_repeat(self) -> bool:
        """Whether one answer can hold several calls."""
        return bool(self.begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A format as one base's tokenizer has it.

    Attributes:
        format: the format.
        token_ids: of those of its marks that are a token which no text stands for.
        shown_ids: of those which decoding drops, so that they must be asked for.
    """

    format: Format
    token_ids: dict[str, int]
    shown_ids: tuple[int, ...] = ()
