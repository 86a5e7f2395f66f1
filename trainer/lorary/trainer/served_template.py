"""The template that a server puts a caller's plain text into, for adapters that were not trained with one.

An adapter for conversations is asked in conversations, which servers render with the base's chat template. So that
plain text works too, the manifest has that template's rendering of one user turn, with the text left open and
with the system turn that all conversations of the data begin with, if they agree on one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lorary.bases.prompts import compile_template
from lorary.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.bases.prompts import PromptBuilder
    from lorary.trainer.examples import Example
    from lorary.trainer.recipe import Recipe

_MARK = "lorary text goes here"
# What a template may do to a text that shows: trim it, or look at what it begins or holds.
_TRIALS = ("word", " two words\n", "/slash <tag> {{ x }}", "a\n\nb")


def with_served_template(
    recipe: Recipe, builder: PromptBuilder, examples: Sequence[Example]
) -> Recipe:
    """Return the recipe with ``task.template``, where it has none and one can be made.

    Args:
        recipe: whose ``data.shape`` is decided.
        builder: of the base.
        examples: some of the data's, in their form.
    """
    if recipe.task.template:
        return recipe
    if recipe.data.shape in ("text", "completion"):
        template = f"{_quoted(builder.bos)}{{{{ text }}}}"
    else:
        template = chat_template_of_one_turn(builder, _common_system(examples))
    return dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, template=template))


def chat_template_of_one_turn(
    builder: PromptBuilder, system: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return a task template that gives what the base's chat template gives for one user turn.

    Empty where there is none: the base's does more with a text than to insert or trim it, or refuses such a
    conversation. Callers then send messages.
    """
    try:
        rendered = builder.render_chat([*system, {"role": "user", "content": _MARK}])
        before, found, after = rendered.partition(_MARK)
        slots = ("{{ text }}", "{{ text | trim }}") if found else ()
        for slot in slots:
            template = f"{_quoted(before)}{slot}{_quoted(after)}"
            compiled = compile_template(template)
            if all(
                compiled.render(text=text)
                == builder.render_chat([*system, {"role": "user", "content": text}])
                for text in _TRIALS
            ):
                return template
    except InvalidRequest:  # it refuses a conversation of one turn
        return ""
    return ""


def _common_system(examples: Sequence[Example]) -> list[Mapping[str, Any]]:
    """Return the system turn that all examples begin with, if they have the same one."""
    firsts = [example.messages[0] for example in examples if example.messages]
    is_common = firsts and all(first == firsts[0] for first in firsts)
    return [firsts[0]] if is_common and firsts[0]["role"] == "system" else []


def _quoted(text: str) -> str:
    """Write a text so that Jinja gives it back."""
    for marker in ("{{", "{%", "{#"):
        text = text.replace(marker, "{{ '" + marker + "' }}")
    return text
