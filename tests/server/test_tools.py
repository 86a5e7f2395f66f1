"""Tool calls: which form a template writes, what a reader finds, and what random weights are made to call."""

from __future__ import annotations

import itertools
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator

from lorary.bases import PromptBuilder
from lorary.errors import InvalidRequest
from lorary.registry import Registry
from lorary.server.engine.request import Sampling
from lorary.server.tools.calling import Calling, with_short_ids
from lorary.server.tools.definitions import Tool, Toolset
from lorary.server.tools.formats import FORMATS
from lorary.server.tools.grammar import MAX_CALLS, closed_schema
from lorary.server.tools.reader import CallReader
from lorary.server.tools.template import ToolTemplate
from tests.conftest import build_llama
from tests.server.conftest import EngineWorld
from tests.tool_templates import MARKS, tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "at": {"$ref": "#/$defs/place"},
        "how": {"enum": ["near", "far"]},
        "deep": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["at"],
    "$defs": {"place": {"type": "integer", "minimum": 10, "maximum": 99}},
}
NOW: dict[str, Any] = {"type": "object", "properties": {}}
SCHEMAS = {"look": LOOK, "look_up": NOW, "now": NOW}
TOOLS = tuple(Tool(name=n, description=n, parameters=s) for n, s in SCHEMAS.items())


def template_of(name: str, **options: Any) -> ToolTemplate:
    return ToolTemplate(PromptBuilder(tokenizer_of(name, **options)))


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("hermes", "hermes"),
        ("hermes, name last", "hermes"),
        ("llama3", "llama3"),
        ("mistral", "mistral"),
    ],
)
def test_a_template_is_asked_how_it_writes_calls(template: str, wanted: str) -> None:
    assert template_of(template).form.format.name == wanted


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("untold", "the same prompt with tools and without"),
        ("silent", "this server reads hermes, llama3, mistral"),
        ("coder", "<function=probe_tool>"),
    ],
)
def test_a_template_without_calls_that_are_known_is_refused(template: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        _ = template_of(template).form
    assert refused.value.field == "input.chat.tools"


def test_a_format_can_be_named_for_a_template_that_writes_none() -> None:
    builder = PromptBuilder(tokenizer_of("coder"))
    assert ToolTemplate(builder, "hermes").form.format.name == "hermes"
    with pytest.raises(InvalidRequest, match="with tools and without"):
        _ = ToolTemplate(PromptBuilder(tokenizer_of("untold")), "hermes").form


@pytest.mark.parametrize("marks", ["text", "added", "special"])
def test_marks_are_tokens_where_the_tokenizer_has_them(marks: str) -> None:
    tokenizer = tokenizer_of("hermes", marks=marks)
    form = ToolTemplate(PromptBuilder(tokenizer)).form
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in MARKS["hermes"]}
    assert form.token_ids == ({} if marks == "text" else ids)
    assert form.shown_ids == (tuple(sorted(ids.values())) if marks == "special" else ())


def test_ids_are_shortened_for_templates_that_demand_it() -> None:
    call = {"id": "call_abc", "type": "function", "function": {"name": "now", "arguments": {}}}
    turns: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "call_abc", "name": "now"},
    ]
    builder = PromptBuilder(tokenizer_of("mistral"))
    with pytest.raises(InvalidRequest, match="nine letters"):
        builder.from_chat(turns)
    short: Any = with_short_ids(turns)
    assert builder.from_chat(short)
    assert short[1]["tool_calls"][0]["id"] == short[2]["tool_call_id"] != "call_abc"


def test_special_tokens_anywhere_in_a_tool_are_refused() -> None:
    builder = PromptBuilder(tokenizer_of("hermes"))
    turn = {"role": "user", "content": "a"}
    evil = "<|im_end|>"
    for tool in (
        Tool(name="a", description=evil, parameters=NOW),
        Tool(name="a", description="", parameters={"properties": {evil: {}}}),
        Tool(name="a", description="", parameters={"enum": [["x", {"y": evil}]]}),
    ):
        with pytest.raises(InvalidRequest, match="special token") as refused:
            builder.from_chat([turn], [tool.told()])
        assert refused.value.field == "input.chat.tools[0]"
    call = {"id": "c", "function": {"name": "now", "arguments": {"x": evil}}}
    with pytest.raises(InvalidRequest, match="special token"):
        builder.from_chat([turn, {"role": "assistant", "content": "", "tool_calls": [call]}])


ANSWERS: dict[str, list[tuple[str, str, list[tuple[str, str]], bool]]] = {
    "hermes": [
        (
            'Let me see.\n\n<tool_call>\n{"name": "look", "arguments": {"s": "}\\"{</tool_call>"}}\n'
            '</tool_call>\n<tool_call>{"name":"now","arguments":{}}</tool_call>\n',
            "Let me see.",
            [("look", '{"s": "}\\"{</tool_call>"}'), ("now", "{}")],
            True,
        ),
        (" a <tool_ <b>\n", " a <tool_ <b>\n", [], False),
        ("<tool_call>\nnothing", "<tool_call>\nnothing", [], False),
        ('<tool_call>{"name": "lo', '<tool_call>{"name": "lo', [], False),
        (
            '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
            [],
            False,
        ),
        ('<tool_call>{"name": "look", "arguments": {"a": [', "", [("look", '{"a": [')], False),
        ('<tool_call>{"name": "now", "arguments": {}}</tool', "", [("now", "{}")], True),
    ],
    "llama3": [
        ('{"name": "look_up", "parameters": {"a": 1}}', "", [("look_up", '{"a": 1}')], True),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', [], False),
        (
            'See {"name": "now", "parameters": {}}',
            'See {"name": "now", "parameters": {}}',
            [],
            False,
        ),
        ('{"a": 1}', '{"a": 1}', [], False),
    ],
    "mistral": [
        (
            '[TOOL_CALLS] [{"name": "now", "arguments": {}} , {"name": "look", "arguments": {"at": 3}}]',
            "",
            [("now", "{}"), ("look", '{"at": 3}')],
            True,
        ),
        ("[TOOL_CALLS] no", "[TOOL_CALLS] no", [], False),
    ],
}


@pytest.mark.parametrize(
    ("name", "text", "content", "calls", "is_whole"),
    [(name, *answer) for name, answers in ANSWERS.items() for answer in answers],
)
def test_answers_are_read_the_same_however_they_are_cut(
    name: str, text: str, content: str, calls: list[tuple[str, str]], *, is_whole: bool
) -> None:
    rng = random.Random(0)
    for _ in range(40):
        reader = CallReader(FORMATS[name], SCHEMAS, lambda: "x")
        said, parts = "", [["", ""] for _ in calls]
        cuts = sorted({0, len(text), *rng.sample(range(len(text)), rng.randrange(len(text)))})
        for begin, end in itertools.pairwise(cuts):
            piece = reader.push(text[begin:end], is_last=end == len(text))
            said += piece.content
            for one in piece.calls:
                parts[one.index][0] += one.name
                parts[one.index][1] += one.arguments
        assert (said, [tuple(part) for part in parts]) == (content, calls)
        assert (reader.content, [(c.name, c.arguments) for c in reader.calls]) == (content, calls)
        assert reader.has_whole_calls is is_whole


def test_schemas_are_closed_where_they_list_what_they_know() -> None:
    assert closed_schema(LOOK) == LOOK | {"additionalProperties": False}
    assert closed_schema({}) == {"type": "object", "additionalProperties": True}
    free = {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}
    assert closed_schema(free) == {**free, "type": "object"}


class Speaker:
    """A tiny base of random weights that calls tools in one form."""

    def __init__(self, form: str, marks: str, root: Path) -> None:
        tokenizer = tokenizer_of(form, marks=marks)
        base = build_llama(root / "base", tokenizer=tokenizer, max_position_embeddings=4096)
        registry = Registry.open(root / "registry", create=True)
        self.world = EngineWorld(base, registry, max_context=4096, prefill_budget=1024)
        self.builder = PromptBuilder(self.world.tokenizer)
        self.form = ToolTemplate(self.builder).form

    def answer(
        self,
        *,
        mode: Any = "required",
        names: Sequence[str] = tuple(SCHEMAS),
        seed: int = 0,
        is_parallel: bool = True,
        **options: Any,
    ) -> CallReader:
        """Return an answer, read."""
        allowed = tuple((i, t) for i, t in enumerate(TOOLS) if t.name in names)
        toolset = Toolset(tools=TOOLS, callable=allowed, mode=mode, is_parallel=is_parallel)
        calling = Calling(toolset, self.form)
        prompt = self.builder.from_chat(
            [{"role": "user", "content": "the cat"}], [tool.told() for tool in TOOLS]
        )
        chosen = {"max_tokens": 1500, "temperature": 1.5, "seed": seed, **options}
        sampling = calling.constrained(Sampling(**chosen))
        constrained = {name: getattr(sampling, name) for name in ("constraint", "shown_ids")}
        asked = self.world.submit(prompt, **chosen, **constrained)
        _, finish, error = self.world.collector.wait(asked)
        assert error is None
        assert finish is not None
        self.reason = finish.reason
        self.text = finish.text
        reader = calling.reader()
        reader.push(finish.text, is_last=True)
        return reader


SPEAKERS = [
    ("hermes", "text"),
    ("hermes", "added"),
    ("hermes", "special"),
    ("llama3", "text"),
    ("mistral", "special"),
]


@pytest.fixture(scope="module", params=SPEAKERS, ids="-".join)
def speaker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Speaker]:
    form, marks = request.param
    made = Speaker(form, marks, tmp_path_factory.mktemp("speaker"))
    yield made
    made.world.close()


def check(reader: CallReader) -> None:
    """Every call names a function that exists, with arguments that fit."""
    for call in reader.calls:
        Draft202012Validator(closed_schema(SCHEMAS[call.name])).validate(json.loads(call.arguments))


def test_random_weights_make_valid_calls_when_one_is_required(speaker: Speaker) -> None:
    called = set()
    for seed in range(6):
        reader = speaker.answer(seed=seed)
        assert (speaker.reason, reader.content) == ("stop", ""), speaker.text
        assert reader.has_whole_calls
        assert len(reader.calls) <= (MAX_CALLS if speaker.form.format.may_repeat else 1)
        check(reader)
        called |= {call.name for call in reader.calls}
    assert len(called) > 1


def test_a_named_function_is_the_one_that_is_called_once(speaker: Speaker) -> None:
    for name in SCHEMAS:
        reader = speaker.answer(names=[name], is_parallel=False)
        assert [call.name for call in reader.calls] == [name]
        check(reader)


def test_text_that_begins_a_call_becomes_one_and_other_text_stays(speaker: Speaker) -> None:
    """A bias on a call's first token makes the model begin one; a bias against it, none."""
    begin = speaker.form.format.begin or '{"name": "now", "parameters": {'
    first = speaker.builder.encode(begin)
    asked: dict[str, Any] = {"mode": "auto", "is_parallel": False, "temperature": 0.0}
    if len(first) == 1:
        reader = speaker.answer(**asked, logit_bias=((first[0], 100.0),))
        assert len(reader.calls) == 1
        check(reader)
    reader = speaker.answer(
        **asked, max_tokens=20, logit_bias=tuple((i, -100.0) for i in set(first))
    )
    assert (reader.calls, reader.content) == ([], speaker.text)
