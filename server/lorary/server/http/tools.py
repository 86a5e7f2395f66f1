"""Tools in OpenAI's words: read into the protocol's, and told from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.server.http.body import Fields, json_text
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

_MODES = {
    "none": pb.TOOL_MODE_NONE,
    "auto": pb.TOOL_MODE_AUTO,
    "required": pb.TOOL_MODE_REQUIRED,
}


def read_tools(fields: Fields, chat: pb.ChatMessages) -> None:
    """Put ``tools``, ``tool_choice`` and ``parallel_tool_calls`` into a chat.

    Raises:
        InvalidRequest: one of them is of another shape than OpenAI's.
    """
    for i, tool in enumerate(fields.list("tools", dict, "objects") or ()):
        chat.tools.append(_tool(Fields(tool, f"tools[{i}].")))
    choice = fields.take("tool_choice")
    is_parallel = fields.boolean("parallel_tool_calls")
    if is_parallel is not None:
        chat.parallel_tool_calls = is_parallel
    if isinstance(choice, dict):
        _named(Fields(choice, "tool_choice."), chat)
    elif choice is not None:
        if not isinstance(choice, str) or choice not in _MODES:
            raise fields.error(
                "tool_choice",
                "tool_choice must be 'none', 'auto', 'required', or name a function: "
                '{"type": "function", "function": {"name": …}}.',
            )
        chat.tool_choice.mode = _MODES[choice]


def read_tool_calls(fields: Fields) -> list[pb.ToolCall]:
    """Return the calls of an assistant's message."""
    calls = []
    for i, call in enumerate(fields.list("tool_calls", dict, "objects") or ()):
        one = fields.within(f"tool_calls[{i}]", call)
        _check_kind(one)
        function = one.required("function")
        calls.append(
            pb.ToolCall(
                id=one.text("id") or "",
                name=function.text("name") or "",
                arguments=function.text("arguments") or "",
            )
        )
        function.finish()
        one.finish({"index"})
    return calls


def told_calls(calls: Iterable[pb.ToolCall]) -> list[dict[str, Any]]:
    """Return calls as a whole message holds them."""
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def told_chunks(chunks: Iterable[pb.ToolCallChunk]) -> list[dict[str, Any]]:
    """Return parts of calls as a delta holds them: id, type and name come with the first one."""
    told = []
    for chunk in chunks:
        function = {"arguments": chunk.arguments}
        if chunk.id:
            first = {"id": chunk.id, "type": "function"}
            told.append(
                {"index": chunk.index, **first, "function": {"name": chunk.name, **function}}
            )
        else:
            told.append({"index": chunk.index, "function": function})
    return told


def _tool(fields: Fields) -> pb.Tool:
    _check_kind(fields)
    function = fields.required("function")
    parameters = function.mapping("parameters")
    # Arguments always fit their schema.
    function.switch("strict")
    tool = pb.Tool(
        name=function.text("name") or "",
        description=function.text("description") or "",
        parameters="" if parameters is None else json_text(function, "parameters", parameters),
    )
    function.finish()
    fields.finish()
    return tool


def _named(fields: Fields, chat: pb.ChatMessages) -> None:
    """Read a choice that names functions: one that is to be called, or those that may be."""
    kind = fields.text("type")
    if kind == "function":
        chat.tool_choice.mode = pb.TOOL_MODE_REQUIRED
        chat.tool_choice.functions.append(_name_of(fields))
        chat.parallel_tool_calls = False
    elif kind == "allowed_tools":
        allowed = fields.required("allowed_tools")
        mode = allowed.text("mode")
        if mode not in ("auto", "required"):
            raise allowed.error("mode", f"mode is {mode!r}; it is auto or required.")
        chat.tool_choice.mode = _MODES[mode]
        tools = allowed.list("tools", dict, "objects")
        if not tools:
            raise allowed.error("tools", "tools is empty; name at least one.")
        for i, tool in enumerate(tools):
            one = allowed.within(f"tools[{i}]", tool)
            _check_kind(one)
            chat.tool_choice.functions.append(_name_of(one))
            one.finish()
        allowed.finish()
    else:
        raise fields.error("type", f"type is {kind!r}; it is function or allowed_tools.")
    fields.finish()


def _name_of(fields: Fields) -> str:
    function = fields.required("function")
    name = function.text("name") or ""
    function.finish()
    return name


def _check_kind(fields: Fields) -> None:
    kind = fields.text("type")
    if kind != "function":
        raise fields.error("type", f"type is {kind!r}; tools are functions.")
