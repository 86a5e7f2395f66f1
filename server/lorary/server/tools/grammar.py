"""The grammar of answers that may or must call tools, in llguidance's variant of Lark.

Text is free until a call begins; from there on nothing but a call of a function that exists, with arguments
that fit its schema, can follow. What a form marks with a token of its own is that token in the grammar, and
what it marks with text is text: the same letters in other tokens, or elsewhere, are neither.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.tools.definitions import Tool, Toolset
    from lorary.server.tools.form import Form, Format

MAX_CALLS = 16
"""Of one answer: a small model that has begun to call may never end."""
_ANY = "(?s:.*)"
# Members that say more of other members than 'properties' does.
_OPEN = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "$ref"}
    | {"allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas", "minProperties"}
)
# As json.dumps writes.
_SPACES = {"whitespace_pattern": " ?"}


def call_grammar(toolset: Toolset, form: Form) -> str:
    """Return the grammar of a whole answer."""
    tools = [tool for _, tool in toolset.callable]
    num_calls = MAX_CALLS if toolset.is_parallel and form.format.may_repeat else 1
    if toolset.mode == "required":
        lines = _required(form, num_calls)
    else:
        lines = _auto(form, tools, num_calls)
    return "\n".join(
        (
            *lines,
            "item: " + " | ".join(f"item_{i}" for i in range(len(tools))),
            *(line for i, tool in enumerate(tools) for line in _item(i, tool, form.format)),
            r"SPACE: /[ \n]?/",
        )
    )


def closed_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call's arguments must fit: the schema, without members that it does not speak of.

    A schema that lists properties and says nothing of others allows any. No function takes arguments that
    it has never heard of, so those are left out; what remains fits the schema as it was sent.
    """
    schema = {**parameters, "type": "object"}
    if not _OPEN & schema.keys():
        schema["additionalProperties"] = "properties" not in schema
    return schema


def _required(form: Form, num_calls: int) -> list[str]:
    more = "" if form.format.is_list else _more("SPACE block", num_calls)
    return [f"start: block{more}", f"block: {_block(form, num_calls)}"]


def _auto(form: Form, tools: Sequence[Tool], num_calls: int) -> list[str]:
    found = form.format
    if not found.begin:
        names = "|".join(re.escape(tool.name) for tool in tools)
        head = rf'\s*\{{\s*"name"\s*:\s*"({names})"'
        return ["start: SPACE item | TEXT", f"TEXT: /{_ANY}/ & ~/{head}{_ANY}/"]
    num_blocks = 1 if found.is_list else num_calls
    tail = _block(form, num_calls).removeprefix(_mark(form, found.begin))
    begin = re.escape(found.begin).replace("/", r"\/")
    free = f"TEXT: /{_ANY}/ & ~/{_ANY}{begin}{_ANY}/"
    if found.begin in form.token_ids:
        block, rest = f"TEXT {_mark(form, found.begin)}{tail}", "TEXT"
        lines = [free]
    else:
        block, rest = f"lead{tail}", "TEXT"
        lines = [free, f"lead[lazy]: BEFORE {_mark(form, found.begin)}", f"BEFORE: /{_ANY}/"]
    # A single call ends the answer; behind one of several, text may go on.
    start = f"{block} | {rest}" if num_blocks == 1 else f"({block}){{0,{num_blocks}}} {rest}"
    return [f"start: {start}", *lines]


def _block(form: Form, num_calls: int) -> str:
    """Return what a begin and an end enclose, with both."""
    found = form.format
    item = "item"
    if found.is_list:
        more = _more('SPACE "," SPACE item', num_calls)
        item = f'"[" SPACE item{more} SPACE "]"'
    begin = f"{_mark(form, found.begin)} SPACE " if found.begin else ""
    end = f" SPACE {_mark(form, found.end)}" if found.end else ""
    return f"{begin}{item}{end}"


def _more(rule: str, num_calls: int) -> str:
    """Return what may follow the first of some calls."""
    return f" ({rule}){{0,{num_calls - 1}}}" if num_calls > 1 else ""


def _item(index: int, tool: Tool, found: Format) -> list[str]:
    head = json.dumps(f'{{"name": "{tool.name}", "{found.arguments}": ')
    schema = json.dumps({**closed_schema(tool.parameters), "x-guidance": _SPACES})
    return [f'item_{index}: {head} args_{index} "}}"', f"args_{index}: %json {schema}"]


def _mark(form: Form, mark: str) -> str:
    token_id = form.token_ids.get(mark)
    return json.dumps(mark) if token_id is None else f"<[{token_id}]>"
