"""What the base's chat template makes of tools, found out by asking it.

No list of templates is kept. The template is given a tool, and the prompt must change; it is given a turn in which
the assistant calls that tool, and the format whose reader reads the call back is the one that it writes.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRequest
from lorary.server.tools.form import Form
from lorary.server.tools.formats import FORMATS
from lorary.server.tools.reader import CallReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorary.server.ports import PromptsLike
    from lorary.server.tools.form import Format

AUTO = "auto"
_NAME, _ID = "probe_tool", "probe0123"
_ARGUMENTS = {"probe_key": "probe"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "probe"}},
            "required": ["probe_key"],
        },
    },
}
_QUESTION: dict[str, Any] = {"role": "user", "content": "probe"}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    ],
}


class ToolTemplate:
    """The chat template's side of tools; used on the thread of prompts.

    Args:
        builder: the base's.
        name: a format's, for templates that write calls as none of them; ``auto`` finds it out.
    """

    def __init__(self, builder: PromptsLike, name: str = AUTO) -> None:
        self._builder = builder
        self._name = name

    @cached_property
    def form(self) -> Form:
        """How this base writes calls.

        Raises:
            InvalidRequest: its template knows no tools, or writes calls as no format does.
        """
        render = self._builder.render_chat
        try:
            asked, told = render([_QUESTION]), render([_QUESTION], [_TOOL])
            if _NAME not in told or told == asked:
                raise _refused("it writes the same prompt with tools and without")
            found = FORMATS.get(self._name) or self._find(told)
        except InvalidRequest as error:
            if error.field == "input.chat.tools":
                raise
            raise _refused(str(error).removesuffix(".")) from error
        marks = [mark for mark in (found.begin, found.end) if mark]
        token_ids = {
            mark: token_id
            for mark in marks
            if (token_id := self._builder.mark_id(mark)) is not None
        }
        shown = {id_ for mark, id_ in token_ids.items() if mark in self._builder.special_tokens}
        return Form(format=found, token_ids=token_ids, shown_ids=tuple(sorted(shown)))

    def _find(self, told: str) -> Format:
        written = self._builder.render_chat([_QUESTION, _CALL], [_TOOL], is_answered=True)
        before = self._builder.render_chat([_QUESTION], [_TOOL], is_answered=True)
        prefix = next((one for one in (told, before) if written.startswith(one)), "")
        answer = written[len(prefix) :]
        for found in FORMATS.values():
            if any(_is_read(found, part) for part in self._parts(answer, found)):
                return found
        raise _refused(
            f"it writes calls as {answer[:120]!r}, and this server reads {', '.join(FORMATS)}. If the "
            "model writes one of these all the same, name it with --tool-format"
        )

    def _parts(self, answer: str, found: Format) -> Iterator[str]:
        """Yield what stands between special tokens, but those of the format itself."""
        # The id that some write into the call is nothing that models write.
        answer = re.sub(rf',\s*"id"\s*:\s*"{_ID}"', "", answer)
        marks = {found.begin, found.end}
        around = [re.escape(one) for one in self._builder.special_tokens if one not in marks]
        return filter(str.strip, re.split("|".join(around), answer) if around else [answer])


def _is_read(found: Format, text: str) -> bool:
    # Some write the name last. Asked for it first, models write it first.
    arguments = rf'"{found.arguments}"\s*:\s*(\{{[^{{}}]*\}})'
    turned = rf'{{"name": "{_NAME}", "{found.arguments}": \1}}'
    text = re.sub(rf'\{{\s*{arguments}\s*,\s*"name"\s*:\s*"{_NAME}"\s*\}}', turned, text)
    reader = CallReader(found, (_NAME,), lambda: _ID)
    reader.push(text.strip(), is_last=True)
    return [json.loads(call.arguments) for call in reader.calls if call.is_whole] == [_ARGUMENTS]


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"this base's chat template cannot be used with tools: {why}. Use a base whose template knows them, "
        "or describe the functions in the messages and ask for JSON.",
        field="input.chat.tools",
    )
