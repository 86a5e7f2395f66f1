"""From what a caller sends to token ids: the same code when training, evaluating and serving.

A task's template is Jinja and renders the *whole* prompt, special tokens included. The completion
that follows it is tokenized apart and appended, so the ids a model is trained on are exactly the
ids it meets when served: ``prompt_ids + completion_ids``, never a joint tokenization that could
merge characters across the seam.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorary.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROLES = ("system", "user", "assistant", "tool")


class _Task(Protocol):
    """The part of a manifest's task that a prompt needs."""

    @property
    def template(self) -> str | None: ...


_JINJA = ImmutableSandboxedEnvironment(
    autoescape=False,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


_ALLOWED_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const),
    *(nodes.If, nodes.CondExpr, nodes.Test, nodes.Compare, nodes.Operand),
    *(nodes.Not, nodes.And, nodes.Or, nodes.Filter),
)
_ALLOWED_FILTERS = frozenset({"capitalize", "lower", "title", "trim", "upper"})
_ALLOWED_TESTS = frozenset({"defined", "undefined"})


class PromptBuilder:
    """Builds token ids for one tokenizer; holds no state, so any thread may call it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        specials = {str(token) for token in added if token.special} | set(
            tokenizer.all_special_tokens
        )
        # Longest first, so that the message names the whole marker.
        self._specials = tuple(sorted(specials, key=len, reverse=True))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The strings that are refused inside a caller's text."""
        return self._specials

    @property
    def chat_template(self) -> str | None:
        """The base's chat template, if it has one; all of them where it has several by name."""
        found = getattr(self._tokenizer, "chat_template", None)
        return "\n".join(found.values()) if isinstance(found, dict) else found or None

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return int(self._tokenizer.eos_token_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of ``special_tokens``."""
        return frozenset(self._tokenizer.convert_tokens_to_ids(list(self._specials)))

    def mark_id(self, text: str) -> int | None:
        """Return the id of an added token that stands for itself and not for the letters of its text.

        Special ones do, and ones in angle brackets: tokenizers make them of these letters, and grammars of
        text (llguidance) do not.
        """
        is_mark = text in self._specials or (text.startswith("<") and text.endswith(">"))
        added = self._tokenizer.added_tokens_decoder.items()
        return next((int(i) for i, token in added if str(token) == text and is_mark), None)

    @cached_property
    def bos(self) -> str:
        """What this tokenizer puts before a text by itself, or nothing; prompts must hold it themselves."""
        bos: str | None = self._tokenizer.bos_token
        first = self._tokenizer("a")["input_ids"][0]
        return bos if bos and first == self._tokenizer.bos_token_id else ""

    def from_task(self, task: _Task, inputs: Mapping[str, str]) -> list[int]:
        """Render ``task.template`` over ``inputs`` (``text`` first) and tokenize it.

        Raises:
            InvalidRequest: the task has no template, an input is empty, missing, or holds a
                special token, or the template itself is broken.
        """
        return self._encode(self.render(task, inputs), field="input.text")

    def render(self, task: _Task, inputs: Mapping[str, str]) -> str:
        """Return the prompt that ``from_task`` tokenizes; raises what it raises."""
        if task.template is None:
            raise InvalidRequest(
                "the adapter has no task template, so it cannot take plain 'text'. "
                "Send 'prompt', 'chat' or 'token_ids'.",
                field="input.text",
            )
        for name, value in inputs.items():
            self.check_text(value, field=f"input.{name}")
        try:
            return compile_template(task.template).render(dict(inputs))
        except jinja2.UndefinedError as error:
            given = ", ".join(sorted(inputs)) or "nothing"
            raise InvalidRequest(
                f"the adapter's template needs an input that was not sent: {error.message}; "
                f"sent: {given}.",
                field="input",
            ) from error
        except (jinja2.TemplateError, TypeError) as error:
            raise InvalidRequest(
                f"the adapter's template cannot be rendered: {error}.", field="input"
            ) from error

    def from_prompt(self, text: str) -> list[int]:
        """Tokenize a complete prompt; special tokens in it are recognised, nothing is added.

        Raises:
            InvalidRequest: the prompt is empty.
        """
        if not text:
            raise InvalidRequest("the prompt is empty; send some text.", field="input.prompt")
        return self._encode(text, field="input.prompt")

    def from_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Render messages with the base's chat template, ready for the assistant's turn.

        Args:
            messages: role, content and perhaps tool calls, in the form of transformers.
            tools: JSON schemas of functions; whether the template knows any is not looked at.

        Raises:
            InvalidRequest: no messages, an unknown role, an empty content or one that holds a
                special token, a base without chat template, or a template that refuses them.
        """
        if not self.chat_template:
            raise InvalidRequest(
                "this base has no chat template, so it cannot take chat messages. "
                "Send 'prompt' or 'token_ids'.",
                field="input.chat",
            )
        if not messages:
            raise InvalidRequest("no chat messages; send at least one.", field="input.chat")
        turns = [self._turn(i, message) for i, message in enumerate(messages)]
        for i, tool in enumerate(tools):
            self._check_strings(tool, f"input.chat.tools[{i}]")
        return self._encode(self.render_chat(turns, tools), field="input.chat")

    def render_chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_answered: bool = False,
    ) -> str:
        """Return turns as the base's chat template writes them; their contents are not checked.

        Args:
            turns: role, content and perhaps tool calls, in the form of transformers.
            tools: JSON schemas of functions, for templates that know them.
            is_answered: the last turn is the assistant's; else its beginning is written behind the turns.

        Raises:
            InvalidRequest: the template refuses them.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(turns),
                add_generation_prompt=not is_answered,
                tokenize=False,
                **({"tools": list(tools)} if tools else {}),
            )
        except (jinja2.TemplateError, TypeError) as error:
            why = error.message if isinstance(error, jinja2.TemplateError) else error
            raise InvalidRequest(
                f"the base's chat template refuses these messages: {why}.",
                field="input.chat",
            ) from error
        return text

    def label_ids(self, label: str, *, field: str = "labels") -> tuple[int, ...]:
        """Return the ids of a label as the completion's beginning, without the end token.

        Raises:
            InvalidRequest: the label is empty or holds a special token; it names ``field``.
        """
        self.check_text(label, field=field)
        return tuple(self._encode(label, field=field))

    def completion_ids(self, target: str) -> list[int]:
        """Return the ids a model is trained to answer: the target, then the end token.

        Raises:
            InvalidRequest: the target is empty or holds a special token.
        """
        self.check_text(target, field="target")
        return [*self._encode(target, field="target"), int(self._tokenizer.eos_token_id)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize a whole text as is, and return ids with the characters ``[start, end)`` of each.

        Raises:
            InvalidRequest: the tokenizer is not one of the fast ones, which alone know offsets, or
                the text is not valid Unicode.
        """
        if not self._tokenizer.is_fast:
            raise InvalidRequest(
                "this base's tokenizer knows no character offsets (it is not a fast one), so what is "
                "learned of a text cannot be told. Use a base with a tokenizer.json.",
                field="text",
            )
        found = self._tokenized(text, field="text", return_offsets_mapping=True)
        return list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]

    def encode(self, text: str) -> list[int]:
        """Tokenize a complete text as is; raises ``InvalidRequest`` if it is not valid Unicode."""
        return self._encode(text, field="text")

    def _turn(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """Check one chat message; a tool may return nothing, and who calls need not say anything."""
        where = f"input.chat.messages[{index}]"
        role, content = message.get("role", ""), message.get("content", "")
        if role not in ROLES:
            raise InvalidRequest(
                f"role {role!r} is unknown; it is one of {', '.join(ROLES)}.", field=f"{where}.role"
            )
        if content or (role != "tool" and not message.get("tool_calls")):
            self.check_text(content, field=f"{where}.content")
        for key in ("tool_calls", "tool_call_id", "name"):
            self._check_strings(message.get(key), f"{where}.{key}")
        return dict(message)

    def _check_strings(self, value: Any, field: str) -> None:
        """Refuse special tokens in any text of a JSON value, the names of its members included."""
        if isinstance(value, dict):
            for name, inner in value.items():
                self._check_strings(name, field)
                self._check_strings(inner, field)
        elif isinstance(value, list | tuple):
            for inner in value:
                self._check_strings(inner, field)
        elif isinstance(value, str) and value.strip():
            self.check_text(value, field=field)

    def check_text(self, value: str, *, field: str) -> None:
        """Refuse what is empty, and what would let text pose as the prompt's own structure.

        Raises:
            InvalidRequest: naming ``field``.
        """
        if not value.strip():
            raise InvalidRequest(f"'{field}' is empty; send some text.", field=field)
        for special in self._specials:
            if special in value:
                raise InvalidRequest(
                    f"'{field}' holds the special token '{special}', which would change the "
                    "prompt's structure. Remove it, or send a complete 'prompt'.",
                    field=field,
                )

    def _encode(self, text: str, *, field: str) -> list[int]:
        """Tokenize as is: nothing added, nothing cut."""
        return list(self._tokenized(text, field=field)["input_ids"])

    def _tokenized(self, text: str, *, field: str, **options: Any) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = self._tokenizer(
                text, add_special_tokens=False, verbose=False, **options
            )
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest(
                f"'{field}' is not valid Unicode text: {error}.", field=field
            ) from error
        return found


@lru_cache(maxsize=256)
def compile_template(source: str) -> jinja2.Template:
    """Compile a task template; cached.

    Templates come with adapters, so a server renders what strangers wrote. They may insert, test and
    trim inputs, and nothing that loops, calls or computes: no template can grow beyond its own
    length and its inputs', or run longer than that takes.

    Raises:
        InvalidRequest: it is not valid Jinja, or uses more than that.
    """
    try:
        tree = _JINJA.parse(source)
        for node in (tree, *tree.find_all(nodes.Node)):
            if not isinstance(node, _ALLOWED_NODES):
                raise _not_allowed(node, type(node).__name__.lower())
            if isinstance(node, nodes.Filter) and node.name not in _ALLOWED_FILTERS:
                raise _not_allowed(node, f"the filter '{node.name}'")
            if isinstance(node, nodes.Test) and node.name not in _ALLOWED_TESTS:
                raise _not_allowed(node, f"the test '{node.name}'")
        return _JINJA.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequest(
            f"the task template is not valid Jinja: line {error.lineno}: {error.message}.",
            field="input",
        ) from error


def _not_allowed(node: nodes.Node, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"the task template uses {what} in line {node.lineno}; templates may insert inputs, test "
        f"them with if, and filter them with {', '.join(sorted(_ALLOWED_FILTERS))}.",
        field="input",
    )
