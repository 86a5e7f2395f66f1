"""One example, whatever it was read from, and how rows of the usual shapes become examples.

===============  ==============================================  ==================================
shape            columns                                         what is learned
===============  ==============================================  ==================================
``template``     the template's inputs, ``target``               the target
``text``         ``text``                                        all of it
``completion``   ``prompt`` (whole), ``completion``              the completion
``chat``         ``messages``, and perhaps ``tools``             every assistant turn
``alpaca``       ``instruction``, ``output``, and perhaps        the output
                 ``input``, ``system``
``sharegpt``     ``conversations``, and perhaps ``system``,      every turn of ``gpt``
                 ``tools``
===============  ==============================================  ==================================
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lorary.errors import InvalidRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorary.trainer.recipe import Shape

Form = Literal["template", "text", "completion", "chat"]
"""How an example becomes a prompt and what is learned; alpaca and sharegpt rows become chats."""

OPTIONAL: dict[Shape, tuple[str, ...]] = {
    "chat": ("tools",),
    "alpaca": ("input", "system"),
    "sharegpt": ("system", "tools"),
}
REQUIRED: dict[Shape, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
"""The columns of a shape, by the names that ``data.columns`` maps; template has those of its inputs."""

_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    "function_call": "function_call",
}
_KEPT_KEYS = ("tool_calls", "tool_call_id", "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row: what is read, and the answer wanted.

    Attributes:
        inputs: what a template reads (``text`` and perhaps more). Of a chat, ``text`` is all before the last
            assistant turn, for hashing, comparing and people.
        target: the answer; of a chat the last assistant turn; empty for ``text``.
        form: how it becomes token ids.
        messages: of a chat: every turn up to the last assistant's.
        tools: of a chat: the functions that the assistant may call, as JSON schemas.
        place: where it was read, for messages.
    """

    inputs: Mapping[str, str]
    target: str
    form: Form = "template"
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = field(default="an example", compare=False)

    @property
    def text(self) -> str:
        """All inputs in one string, for hashing and comparing."""
        return "\n".join(self.inputs[name] for name in sorted(self.inputs))

    @property
    def content(self) -> list[Any]:
        """What the example says, as plain data: its identity."""
        chat = [list(self.messages), list(self.tools)] if self.form == "chat" else []
        return [dict(self.inputs), self.target, *chat]


def shape_of(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Shape:
    """Return the shape whose columns a row has, for recipes that name none.

    Raises:
        InvalidRecipe: none fits, or several do.
    """
    found = [
        shape
        for shape, names in REQUIRED.items()
        if all(columns.get(name, name) in row for name in names)
    ]
    if len(found) != 1:
        what = f"fit the shapes {' and '.join(found)}" if found else "fit no shape"
        wanted = "; ".join(f"{shape}: {', '.join(names)}" for shape, names in REQUIRED.items())
        raise InvalidRecipe(
            f"{place}: the columns {_names(row)} {what} ({wanted}). Set data.shape and "
            "data.columns, or write task.template over the columns."
        )
    return found[0]


def example_maker(
    shape: Shape, columns: Mapping[str, str]
) -> Callable[[str, Mapping[str, Any]], Example]:
    """Return what turns ``(place, row)`` into an example.

    Args:
        shape: one of the module's table.
        columns: what the shape calls a column to what the file calls it; default: the same name.

    Raises:
        InvalidRecipe: ``columns`` names what the shape has not. What is returned raises it for a row
            that lacks a column or has something else in it.
    """
    if shape == "template":
        named = dict(columns) or {"text": "text"}
        named.setdefault("target", "target")
        if len(named) < 2:
            raise InvalidRecipe("data.columns names no input; add one, such as 'text: <column>'.")
        return lambda place, row: _from_inputs(row, named, place)
    known = (*REQUIRED[shape], *OPTIONAL.get(shape, ()))
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise InvalidRecipe(
            f"data.columns has '{unknown[0]}', which the shape '{shape}' has not; it has "
            f"{', '.join(known)}."
        )
    make = {
        "text": _from_text,
        "completion": _from_completion,
        "chat": _from_messages,
        "alpaca": _from_alpaca,
        "sharegpt": _from_sharegpt,
    }[shape]
    return lambda place, row: make(_Row(row, columns, place))


@dataclass(frozen=True, slots=True)
class _Row:
    """A row under the names of its shape."""

    row: Mapping[str, Any]
    columns: Mapping[str, str]
    place: str

    def text(self, name: str) -> str:
        """Return a text that is not blank, white space included: it is part of what is learned."""
        return _text(self.row, self.columns.get(name, name), self.place)

    def optional_text(self, name: str) -> str:
        """Return a text, or nothing where the column is absent, null or blank."""
        column = self.columns.get(name, name)
        if name in self.columns:
            _check_column(self.row, column, self.place)
        value = self.row.get(column)
        return (
            "" if value is None or value == "" else _text(self.row, column, self.place, blank=True)
        )

    def items(self, name: str) -> list[Mapping[str, Any]]:
        """Return a list of objects, which may be written as JSON; empty where an optional one is absent."""
        column = self.columns.get(name, name)
        is_optional = name == "tools"
        if not is_optional or name in self.columns:
            _check_column(self.row, column, self.place)
        value = self.row.get(column)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InvalidRecipe(
                    f"{self.place}: column '{column}' is not JSON: {error}."
                ) from error
        if is_optional and not value:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise InvalidRecipe(
                f"{self.place}: column '{column}' is {_shown(value)}, not a list of objects."
            )
        return value


def _from_inputs(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Example:
    values = {name: _text(row, column, place).strip() for name, column in columns.items()}
    target = values.pop("target")
    return Example(inputs=values, target=target, place=place)


def _from_text(row: _Row) -> Example:
    text = row.text("text").strip()
    return Example(inputs={"text": text}, target="", form="text", place=row.place)


def _from_completion(row: _Row) -> Example:
    prompt, completion = row.text("prompt"), row.text("completion")
    return Example(inputs={"text": prompt}, target=completion, form="completion", place=row.place)


def _from_alpaca(row: _Row) -> Example:
    question = "\n\n".join(
        part for part in (row.text("instruction"), row.optional_text("input")) if part.strip()
    )
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row.text("output")},
    ]
    return _chat(_with_system(row, turns), (), row.place)


def _from_messages(row: _Row) -> Example:
    return _chat(_turns(row, "messages"), tuple(row.items("tools")), row.place)


def _from_sharegpt(row: _Row) -> Example:
    turns = _with_system(row, _turns(row, "conversations"))
    return _chat(turns, tuple(row.items("tools")), row.place)


def _with_system(row: _Row, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = row.optional_text("system")
    if not system.strip() or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _turns(row: _Row, name: str) -> list[dict[str, Any]]:
    items = row.items(name)
    return [_turn(item, f"{row.place}: {name}[{i}]") for i, item in enumerate(items)]


def _turn(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Read one turn under either pair of names: role and content, from and value."""
    role = _ROLES.get(str(item.get("role", item.get("from"))))
    if role is None:
        raise InvalidRecipe(
            f"{place} has the role {_shown(item.get('role', item.get('from')))}; it is one of "
            f"{', '.join(_ROLES)}."
        )
    content = item.get("content", item.get("value"))
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(content, place)]}
    turn: dict[str, Any] = {"role": role, "content": _content(content, place)}
    turn |= {key: _without_nulls(item[key]) for key in _KEPT_KEYS if item.get(key)}
    if "tool_calls" in turn:
        turn["tool_calls"] = [_parsed_call(call, place) for call in turn["tool_calls"]]
    if not turn["content"].strip() and "tool_calls" not in turn:
        raise InvalidRecipe(f"{place} is empty; leave the turn out, or give it a content.")
    return turn


def _content(content: Any, place: str) -> str:
    """Return the text of a turn; parts of text are joined."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise InvalidRecipe(f"{place} has the content {_shown(content)}, not text.")
    return content or ""


def _call(content: Any, place: str) -> dict[str, Any]:
    """Read sharegpt's function call: JSON with a name and arguments."""
    try:
        call = json.loads(content)
        return {
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRecipe(
            f"{place} is a function_call that is not JSON with name and arguments: "
            f"{_shown(content)}."
        ) from error


def _parsed_call(call: Any, place: str) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, which is what chat templates print as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRecipe(f"{place} has the tool call {_shown(call)} without a name.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InvalidRecipe(
                f"{place}: the arguments of '{function['name']}' are not JSON: {error}."
            ) from error
    return {**call, "function": {"name": function["name"], "arguments": arguments}}


def _without_nulls(value: Any) -> Any:
    """Drop keys that are null: Parquet gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _chat(
    turns: Sequence[Mapping[str, Any]], tools: tuple[Mapping[str, Any], ...], place: str
) -> Example:
    """Return a chat that ends with its last assistant turn; what follows that teaches nothing."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise InvalidRecipe(
            f"{place} has no assistant turn, so nothing of it would be learned. Remove it, or add one."
        )
    if turns[0]["role"] == "assistant":
        raise InvalidRecipe(f"{place} begins with an assistant turn; put a user's before it.")
    answer = turns[last]
    calls = json.dumps(answer["tool_calls"]) if "tool_calls" in answer else ""
    return Example(
        inputs={"text": "\n".join(_transcript(turn) for turn in turns[:last])},
        target=answer["content"] or calls,
        form="chat",
        messages=tuple(turns[: last + 1]),
        tools=tools,
        place=place,
    )


def _transcript(turn: Mapping[str, Any]) -> str:
    calls = f" {json.dumps(turn['tool_calls'])}" if "tool_calls" in turn else ""
    return f"{turn['role']}: {turn['content']}{calls}"


def _check_column(row: Mapping[str, Any], column: str, place: str) -> None:
    if column not in row:
        raise InvalidRecipe(
            f"{place} has no column '{column}'; it has {_names(row)}. Set data.columns."
        )


def _text(row: Mapping[str, Any], column: str, place: str, *, blank: bool = False) -> str:
    """Return one text of a row, numbers as they are written."""
    _check_column(row, column, place)
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InvalidRecipe(f"{place}: column '{column}' is {_shown(value)}, not text.")
    text = str(value)
    if not blank and not text.strip():
        raise InvalidRecipe(f"{place}: column '{column}' is empty.")
    return text


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _shown(value: Any) -> str:
    """Return a value as a message has it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
