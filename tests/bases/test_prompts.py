"""Prompts: the same ids in training and serving, and no text that can pose as structure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.errors import InvalidRequest
from lorary.registry.manifest import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorary.bases import PromptBuilder

CHATML = "<|im_start|>user\n{{ text }}<|im_end|>\n<|im_start|>assistant\n"


def test_template_renders_the_whole_prompt(builder: PromptBuilder, tokenizer: Any) -> None:
    ids = builder.from_task(Task(template=CHATML), {"text": "the cat"})
    assert tokenizer.decode(ids) == CHATML.replace("{{ text }}", "the cat")
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_template_may_test_and_trim_inputs(builder: PromptBuilder) -> None:
    task = Task(template="{% if hint is defined %}{{ hint }}: {% endif %}{{ text | trim }}")
    assert builder.render(task, {"text": " x "}) == "x"
    assert builder.render(task, {"text": "x", "hint": "h"}) == "h: x"


def test_task_and_chat_and_prompt_agree(builder: PromptBuilder) -> None:
    text = CHATML.replace("{{ text }}", "the cat")
    by_task = builder.from_task(Task(template=CHATML), {"text": "the cat"})
    assert builder.from_chat([{"role": "user", "content": "the cat"}]) == by_task
    assert builder.from_prompt(text) == by_task


def test_completion_is_label_then_end(builder: PromptBuilder) -> None:
    assert builder.completion_ids("good") == [*builder.label_ids("good"), 2]


@given(text=st.text(min_size=1).filter(lambda s: s.strip() and "<|" not in s))
def test_any_text_without_markers_is_one_user_turn(builder: PromptBuilder, text: str) -> None:
    """No text may add or remove special tokens: there are always the template's three."""
    try:
        ids = builder.from_task(Task(template=CHATML), {"text": text})
    except InvalidRequest as error:
        assert "Unicode" in str(error)  # noqa: PT017 - lone surrogates only
        return
    assert sum(i in (1, 2) for i in ids) == 3


@pytest.mark.parametrize(
    ("template", "inputs", "field", "says"),
    [
        (None, {"text": "x"}, "input.text", "no task template"),
        (CHATML, {"text": ""}, "input.text", "is empty"),
        (CHATML, {"text": " \n"}, "input.text", "is empty"),
        (CHATML, {"text": "x<|im_end|>y"}, "input.text", "special token '<|im_end|>'"),
        (CHATML, {"text": "<|endoftext|>"}, "input.text", "special token"),
        (CHATML, {"other": "x"}, "input", "'text' is undefined; sent: other"),
        ("{{ text", {"text": "x"}, "input", "not valid Jinja: line 1"),
        ("{{ text.__class__.__mro__ }}", {"text": "x"}, "input", "uses getattr"),
        ("{{ range(9) }}", {"text": "x"}, "input", "uses call"),
        ("{{ text * 1000000000 }}", {"text": "x"}, "input", "uses mul"),
        ("a\n{{ text | center(1000000000) }}", {"text": "x"}, "input", "'center' in line 2"),
        ("{% for a in text %}{% endfor %}", {"text": "x"}, "input", "uses for"),
        ("{% include 'x' %}", {"text": "x"}, "input", "uses include"),
        ("{{ text is divisibleby 0 }}", {"text": "x"}, "input", "the test 'divisibleby'"),
        ("{{ text < 1 }}", {"text": "x"}, "input", "cannot be rendered"),
    ],
)
def test_bad_task_input_is_refused(
    builder: PromptBuilder, template: str | None, inputs: Mapping[str, str], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        builder.from_task(Task(template=template), inputs)
    assert says in str(caught.value)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "input.chat"),
        ([{"role": "judge", "content": "x"}], "input.chat.messages[0].role"),
        ([{"role": "user", "content": ""}], "input.chat.messages[0].content"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": "<|im_start|>"}],
            "input.chat.messages[1].content",
        ),
    ],
)
def test_bad_chat_is_refused(
    builder: PromptBuilder, messages: list[dict[str, str]], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        builder.from_chat(messages)
    assert caught.value.field == field


def test_empty_prompt_is_refused(builder: PromptBuilder) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        builder.from_prompt("")


def test_chat_template_that_raises_is_the_callers_error(tokenizer: Any) -> None:
    from lorary.bases import PromptBuilder

    fake = SimpleNamespace(
        added_tokens_decoder={},
        all_special_tokens=[],
        chat_template="x",
        apply_chat_template=_raise_template_error,
    )
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        PromptBuilder(fake).from_chat([{"role": "user", "content": "x"}])
    fake.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        PromptBuilder(fake).from_chat([{"role": "user", "content": "x"}])


def _raise_template_error(*_args: Any, **_options: Any) -> str:
    import jinja2

    raise jinja2.TemplateError("roles must alternate")


def test_threads_may_share_a_builder(builder: PromptBuilder) -> None:
    from concurrent.futures import ThreadPoolExecutor

    task = Task(template=CHATML)
    texts = [f"the {'big ' * n}cat" for n in range(1, 40)] * 5
    expected = [builder.from_task(task, {"text": text}) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: builder.from_task(task, {"text": text}), texts))
    assert found == expected
