"""Plain text to an adapter of conversations is what a conversation of one turn is."""

from __future__ import annotations

from typing import Any

import pytest

from lorary.bases import PromptBuilder
from lorary.registry.manifest import Task
from lorary.trainer.examples import Example
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.served_template import chat_template_of_one_turn, with_served_template
from tests.conftest import build_tokenizer

TEXTS = ["the cat", " the cat \n", "{{ text }} {% if %}", "a\n\nb"]
SYSTEM = {"role": "system", "content": "be {{ good }}"}


def builder(template: str | None = None) -> PromptBuilder:
    tokenizer = build_tokenizer(every_byte=True)
    if template is not None:
        tokenizer.chat_template = template
    return PromptBuilder(tokenizer)


@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("content", ["m.content", "m.content | trim"])
def test_template_gives_the_ids_of_a_chat(system: list[dict[str, str]], content: str) -> None:
    made = builder(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ '{{' }}\n{{ "
        + content
        + " }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    task = Task(template=chat_template_of_one_turn(made, system))
    for text in TEXTS:
        turns = [*system, {"role": "user", "content": text}]
        assert made.from_task(task, {"text": text}) == made.from_chat(turns)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('/')[0] }}{% endfor %}",
        "{{ raise_exception('two turns at least') }}",
    ],
)
def test_no_template_where_it_would_not_be_the_same(template: str) -> None:
    assert chat_template_of_one_turn(builder(template)) == ""


def chat(*turns: dict[str, Any]) -> Example:
    return Example(inputs={"text": "x"}, target="x", form="chat", messages=turns)


def test_system_turn_is_served_where_all_conversations_share_it() -> None:
    user = {"role": "user", "content": "x"}
    recipe = build_recipe({"name": "a", "data": {"source": "file", "path": "x", "shape": "chat"}})
    shared = with_served_template(recipe, builder(), [chat(SYSTEM, user), chat(SYSTEM, user)])
    mixed = with_served_template(recipe, builder(), [chat(SYSTEM, user), chat(user)])
    assert "system" in shared.task.template
    assert "system" not in mixed.task.template
    given = build_recipe(
        {"name": "a", "task": {"template": "{{ text }}!"}, "data": recipe_tree(recipe)}
    )
    assert with_served_template(given, builder(), []).task.template == "{{ text }}!"


def recipe_tree(recipe: Any) -> dict[str, Any]:
    return {"source": recipe.data.source, "path": recipe.data.path, "shape": recipe.data.shape}
