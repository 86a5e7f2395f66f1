"""What is learned, and that what comes before it is what a server would read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lorary.bases import PromptBuilder
from lorary.errors import InvalidRecipe
from lorary.registry.manifest import Task
from lorary.trainer.encoding import Encoder, Row
from lorary.trainer.examples import Example
from tests.conftest import build_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEM = {"role": "system", "content": "the big cat"}
USER = {"role": "user", "content": "is the film good"}
ANSWER = {"role": "assistant", "content": "very good"}
# Reasoning is kept in the last turn only, as newer templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.role == 'user' or loop.last else 'so' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(every_byte=True)


def encoder(tokenizer: Any, template: str | None = None) -> Encoder:
    return Encoder(PromptBuilder(tokenizer), Task(template=template))


def chat(*messages: dict[str, Any], **more: Any) -> Example:
    return Example(
        inputs={"text": "x"}, target="x", form="chat", messages=messages, place="line 3", **more
    )


def learned(tokenizer: Any, row: Row) -> list[str]:
    """The runs of learned tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, is_learned in zip(row.input_ids, row.is_learned(), strict=True):
        if is_learned:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def served(tokenizer: Any, turns: Sequence[dict[str, Any]]) -> list[int]:
    return PromptBuilder(tokenizer).from_chat(turns)


def test_every_assistant_turn_is_learned_with_its_end_and_nothing_else(tokenizer: Any) -> None:
    turns = [
        SYSTEM,
        USER,
        ANSWER,
        {**USER, "content": "and the hat?"},
        {**ANSWER, "content": "é 😀"},
    ]
    (row,) = encoder(tokenizer).rows(chat(*turns), 99)
    assert learned(tokenizer, row) == ["very good<|im_end|>", "é 😀<|im_end|>"]
    assert row.input_ids[-1] == tokenizer.eos_token_id
    for count in (2, 4):  # what a server reads before each answer
        asked = served(tokenizer, turns[:count])
        assert list(row.input_ids[: len(asked)]) == asked
        assert not row.is_learned()[len(asked) - 1]
        assert row.is_learned()[len(asked)]


def test_prompt_is_the_servers_even_where_characters_would_merge(tokenizer: Any) -> None:
    """The answer begins with what the prompt ends with, so one token could span both."""
    tokenizer = build_tokenizer(every_byte=True)
    tokenizer.add_tokens(["\n\n", "th"])
    turns = [USER, {**ANSWER, "content": "\nvery"}]
    (row,) = encoder(tokenizer).rows(chat(*turns), 99)
    asked = served(tokenizer, turns[:1])
    whole = PromptBuilder(tokenizer).render_chat(turns, is_answered=True)
    assert tokenizer(whole, add_special_tokens=False)["input_ids"][: len(asked)] != asked
    assert row.num_prompt == len(asked)
    assert list(row.input_ids[: len(asked)]) == asked
    assert learned(tokenizer, row) == ["\nvery<|im_end|>"]
    example = Example(inputs={"text": "ca t"}, target="he", form="completion")
    (row,) = encoder(tokenizer).rows(example, 99)
    assert list(row.input_ids[: row.num_prompt]) == tokenizer("ca t")["input_ids"]
    assert learned(tokenizer, row) == ["he<|im_end|>"]


def test_completion_is_tokenized_jointly_and_ends(tokenizer: Any) -> None:
    example = Example(inputs={"text": "<|im_start|>the cat"}, target=" sat", form="completion")
    (row,) = encoder(tokenizer).rows(example, 99)
    joint = tokenizer("<|im_start|>the cat sat", add_special_tokens=False)["input_ids"]
    assert list(row.input_ids) == [*joint, tokenizer.eos_token_id]
    assert learned(tokenizer, row) == [" sat<|im_end|>"]
    assert encoder(tokenizer).prompt(example) == list(row.input_ids[: row.num_prompt])


def test_text_is_learned_whole_and_cut_into_rows(tokenizer: Any) -> None:
    text = "the cat sat on the mat. " * 9
    rows = encoder(tokenizer).rows(
        Example(inputs={"text": text.strip()}, target="", form="text"), 16
    )
    whole = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    once = [token for row in rows for token in row.input_ids[1:]]
    assert [whole[0], *once] == [*whole, tokenizer.eos_token_id]
    assert len(rows) > 2
    assert all(row.num_prompt == 1 and 8 < len(row.input_ids) <= 16 for row in rows)


def test_bos_is_put_where_the_tokenizer_would(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(every_byte=True)
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    for form in ("text", "completion"):
        for text in ("the cat", "<|endoftext|>the cat"):
            if form == "text" and text.startswith("<"):
                continue
            example = Example(inputs={"text": text}, target="sat", form=form)  # type: ignore[arg-type]
            (row,) = encoder(tokenizer).rows(example, 99)
            assert row.input_ids.count(bos) == 1
            assert row.input_ids[0] == bos


def test_template_that_forgets_makes_a_row_of_each_turn(tokenizer: Any) -> None:
    tokenizer = build_tokenizer(every_byte=True)
    tokenizer.chat_template = FORGETFUL
    turns = [USER, ANSWER, USER, {**ANSWER, "content": "yes"}]
    rows = encoder(tokenizer).rows(chat(*turns), 99)
    assert [learned(tokenizer, row) for row in rows] == [
        ["very good<|im_end|>"],
        ["yes<|im_end|>"],
    ]
    for row, count in zip(rows, (1, 3), strict=True):
        assert list(row.input_ids[: row.num_prompt]) == served(tokenizer, turns[:count])


def test_answer_ends_even_where_the_template_writes_no_end(tokenizer: Any) -> None:
    tokenizer = build_tokenizer(every_byte=True)
    tokenizer.chat_template = WITHOUT_END
    (row,) = encoder(tokenizer).rows(chat(USER, ANSWER), 99)
    assert learned(tokenizer, row) == ["very good\n<|im_end|>"]


def test_tools_reach_the_template_or_are_refused(tokenizer: Any) -> None:
    tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 3}}}
    asking = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(InvalidRecipe, match=r"line 3 cannot .* knows no tools"):
        encoder(tokenizer).rows(chat(USER, ANSWER, tools=tools), 99)
    with pytest.raises(InvalidRecipe, match="knows no tool_calls"):
        encoder(tokenizer).rows(chat(USER, asking), 99)
    knowing = build_tokenizer(every_byte=True)
    knowing.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (row,) = encoder(knowing).rows(chat(USER, asking, tools=tools), 99)
    assert knowing.decode(row.input_ids).startswith("look\n")
    assert learned(knowing, row) == ['{"name": "look", "arguments": {"at": 3}}<|im_end|>']


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (chat({**USER, "content": "<|im_end|>"}, ANSWER), "line 3 cannot be tokenized.*special"),
        (
            Example(inputs={"text": "a"}, target="<|im_end|>", form="completion", place="line 4"),
            "line 4 cannot be tokenized.*special token",
        ),
        (Example(inputs={"text": "a"}, target=" ", place="line 5"), "line 5.*'target' is empty"),
    ],
)
def test_bad_example_is_refused_by_its_place(tokenizer: Any, example: Example, says: str) -> None:
    with pytest.raises(InvalidRecipe, match=says):
        encoder(tokenizer, "{{ text }}").rows(example, 99)


def test_row_without_a_learned_token_is_refused_by_its_place(tokenizer: Any) -> None:
    class Silent(Encoder):
        def _from_template(self, example: Example) -> Row:
            return Row(input_ids=(1, 2), num_prompt=2)

    silent = Silent(PromptBuilder(tokenizer), Task(template="{{ text }}"))
    with pytest.raises(InvalidRecipe, match="line 6 has no token that would be learned"):
        silent.rows(Example(inputs={"text": "a"}, target="b", place="line 6"), 99)
