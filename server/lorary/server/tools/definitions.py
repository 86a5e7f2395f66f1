"""What a call says of tools, checked before any work."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorary.errors import InvalidRequest
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

MAX_TOOLS = 128
MAX_TOOL_BYTES = 65_536
"""Of all names, descriptions and schemas of one call together."""
MAX_DEPTH = 64
"""Of a schema, and of a call's arguments."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def told(self) -> dict[str, Any]:
        """Return it as chat templates take it."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolset:
    """The functions of one call.

    Attributes:
        tools: all that the prompt tells of; none where the model is to call none.
        callable: those that may be called, with their places in what was sent.
        mode: whether it calls.
        is_parallel: whether one answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    callable: tuple[tuple[int, Tool], ...]
    mode: Literal["auto", "required"]
    is_parallel: bool


def read_toolset(chat: pb.ChatMessages) -> Toolset | None:
    """Return the functions that a chat may call; None where it has none, or is to call none.

    Raises:
        InvalidRequest: too many or too large, a name or schema that is none, or a choice that is not there.
    """
    tools = _read_tools(chat.tools)
    choice = chat.tool_choice
    names = {tool.name for tool in tools}
    for i, name in enumerate(choice.functions):
        if name not in names:
            raise InvalidRequest(
                f"tool_choice names {name[:64]!r}, which is none of the tools. Send its definition, too.",
                field=f"input.chat.tool_choice.functions[{i}]",
            )
    if choice.mode == pb.TOOL_MODE_REQUIRED and not tools:
        raise InvalidRequest(
            "tool_choice is 'required' and there are no tools. Send some.",
            field="input.chat.tool_choice",
        )
    if not tools or choice.mode == pb.TOOL_MODE_NONE:
        return None
    chosen = set(choice.functions) or names
    is_parallel = chat.parallel_tool_calls or not chat.HasField("parallel_tool_calls")
    return Toolset(
        tools=tools,
        callable=tuple((i, tool) for i, tool in enumerate(tools) if tool.name in chosen),
        mode="required" if choice.mode == pb.TOOL_MODE_REQUIRED else "auto",
        is_parallel=is_parallel,
    )


def check_options(toolset: Toolset, params: pb.SamplingParams) -> None:
    """Refuse what cannot hold together with tool calls.

    Raises:
        InvalidRequest: naming the option.
    """
    constraint = params.WhichOneof("constraint")
    for name, is_set in (
        (constraint or "", constraint is not None),
        ("min_tokens", bool(params.min_tokens)),
        ("ignore_eos", params.ignore_eos),
    ):
        if is_set:
            raise InvalidRequest(
                f"{name} was sent with tools, whose schemas say what an answer may be. Leave one of "
                "them out, or let tool_choice be 'none'.",
                field=f"sampling.{name}",
            )
    if params.stop and toolset.mode == "required":
        raise InvalidRequest(
            "stop was sent with a tool_choice that requires a call, which a stop string would cut off. "
            "Leave stop out; a call ends by itself.",
            field="sampling.stop",
        )


def turns_of(messages: Sequence[pb.ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them: arguments as objects, a tool's turn with its name.

    Raises:
        InvalidRequest: a call without id or name, arguments that are no JSON object, calls in somebody
            else's turn, or an answer to no call.
    """
    names: dict[str, str] = {}
    turns = []
    for i, message in enumerate(messages):
        where = f"input.chat.messages[{i}]"
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            if message.role != "assistant":
                raise InvalidRequest(
                    f"{where} has tool calls and the role {message.role[:64]!r}; only an assistant calls.",
                    field=f"{where}.tool_calls",
                )
            turn["tool_calls"] = [
                _call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(message.tool_calls)
            ]
            names.update((call.id, call.name) for call in message.tool_calls)
        if message.role == "tool":
            if message.tool_call_id not in names:
                raise InvalidRequest(
                    f"{where} answers the call {message.tool_call_id[:64]!r}, and no assistant's turn "
                    "before it made one. Send that turn with its tool_calls, too.",
                    field=f"{where}.tool_call_id",
                )
            turn |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        turns.append(turn)
    return turns


def _call(call: pb.ToolCall, where: str) -> dict[str, Any]:
    if not call.id:
        raise InvalidRequest(f"{where} has no id; send the one it came with.", field=f"{where}.id")
    _check_name(call.name, f"{where}.name")
    arguments = _object(call.arguments or "{}", f"{where}.arguments")
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _read_tools(tools: Collection[pb.Tool]) -> tuple[Tool, ...]:
    field = "input.chat.tools"
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"{len(tools)} tools were sent; at most {MAX_TOOLS} are allowed. Send fewer.",
            field=field,
        )
    size = sum(tool.ByteSize() for tool in tools)
    if size > MAX_TOOL_BYTES:
        raise InvalidRequest(
            f"the tools have {size} bytes; at most {MAX_TOOL_BYTES} are allowed. Send fewer, or shorten "
            "their descriptions.",
            field=field,
        )
    seen: set[str] = set()
    read = []
    for i, tool in enumerate(tools):
        where = f"{field}[{i}]"
        _check_name(tool.name, f"{where}.name")
        if tool.name in seen:
            raise InvalidRequest(
                f"two tools are called {tool.name!r}; names must differ.", field=f"{where}.name"
            )
        seen.add(tool.name)
        read.append(
            Tool(
                name=tool.name,
                description=tool.description,
                parameters=_schema(tool.parameters, f"{where}.parameters"),
            )
        )
    return tuple(read)


def _check_name(name: str, field: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:64]!r} is no name of a function; it has 1 to 64 letters, digits, '_' and '-'.",
            field=field,
        )


def _schema(text: str, field: str) -> dict[str, Any]:
    if not text:
        return _NO_ARGUMENTS
    schema = _object(text, field)
    if schema.get("type", "object") != "object":
        raise InvalidRequest(
            f"the type of a function's parameters is {str(schema['type'])[:64]!r}; arguments are an object.",
            field=field,
        )
    return schema


def _object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is no JSON: {error}.", field=field) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field} is no JSON object; send one.", field=field)
    if _depth(value) > MAX_DEPTH:
        raise InvalidRequest(
            f"{field} is nested more than {MAX_DEPTH} levels deep. Make it flatter.", field=field
        )
    return value


def _depth(value: Any) -> int:
    """Return how many lists and objects of a JSON value stand within each other; without recursion."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return depth
