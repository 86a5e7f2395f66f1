"""Tools over both protocols, on a base of random weights whose template knows them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest
from jsonschema import Draft202012Validator

from lorary.client import Chunk, Client, GenerateResult
from lorary.errors import InvalidRequest
from lorary.registry import Registry
from tests.conftest import build_llama
from tests.processes import serving
from tests.tool_templates import tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.processes import ServerProcess

LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "at": {"type": "integer", "minimum": 10, "maximum": 99},
        "how": {"type": "string", "maxLength": 12},
    },
    "required": ["at", "how"],
    "additionalProperties": False,
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"look": LOOK, "now": NOW}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": name, "description": "it", "parameters": schema, "strict": True},
    }
    for name, schema in SCHEMAS.items()
]
TURNS: Any = [{"role": "user", "content": "the cat"}]
LOOK_ONLY: Any = {"type": "function", "function": {"name": "look"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("tools")
    tokenizer = tokenizer_of("hermes", marks="special")
    base = build_llama(root / "base", tokenizer=tokenizer, max_position_embeddings=2048)
    Registry.open(root / "registry", create=True)
    options = ("--http-port", "0", "--max-context", "2048")
    with serving(base, root / "registry", root, *options) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    url = f"{server.http_url}/v1"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60) as opened:
        yield opened


def named(calls: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in calls or ()]


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "required", "seed": 3},
        {"tool_choice": "required", "seed": 4, "parallel_tool_calls": False},
        {"tool_choice": LOOK_ONLY, "seed": 5},
        {"tool_choice": LOOK_ONLY, "seed": 6, "max_tokens": 45},
        {"tool_choice": "auto", "seed": 7, "max_tokens": 40},
    ],
    ids=lambda options: json.dumps(options)[:60],
)
def test_a_stream_says_what_a_whole_answer_does(
    client: openai.OpenAI, options: dict[str, Any]
) -> None:
    """Gathered by the client's own means; the same seed gives the same answer."""
    asked: dict[str, Any] = {"model": "", "messages": TURNS, "tools": TOOLS, "max_tokens": 900}
    asked |= options
    whole = client.chat.completions.create(**asked).choices[0]
    deltas = [
        chunk.choices[0]
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices
    ]
    calls: dict[int, list[str]] = {}
    for choice in deltas:
        for part in choice.delta.tool_calls or ():
            assert part.function is not None
            if part.index not in calls:
                assert part.id
                assert part.id.startswith("call_")
                assert part.type == "function"
                assert part.function.name
                calls[part.index] = [part.function.name, ""]
            else:
                assert (part.id, part.function.name) == (None, None)
            calls[part.index][1] += part.function.arguments or ""
    told = named(whole.message.tool_calls)
    assert [tuple(call) for call in calls.values()] == told
    said = "".join(choice.delta.content or "" for choice in deltas)
    assert said == (whole.message.content or "")
    assert deltas[-1].finish_reason == whole.finish_reason
    if options["tool_choice"] == "auto":
        assert (whole.finish_reason, told) == ("length", [])
        return
    assert said == ""
    if "max_tokens" in options:
        assert whole.finish_reason == "length"
        assert told[0][1].startswith("{")
        return
    assert whole.finish_reason == "tool_calls"
    for name, arguments in told:
        Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))


def test_the_clients_own_stream_gathers_calls_of_several_answers(client: openai.OpenAI) -> None:
    ids = set()
    for _ in range(2):
        with client.chat.completions.stream(
            model="",
            messages=TURNS,
            tools=TOOLS,
            tool_choice="required",
            n=2,
            seed=8,
            max_tokens=900,
        ) as stream:
            answer = stream.get_final_completion()
        assert len(answer.choices) == 2
        for choice in answer.choices:
            assert choice.finish_reason == "tool_calls"
            for call in choice.message.tool_calls or ():
                Draft202012Validator(SCHEMAS[call.function.name]).validate(
                    call.function.parsed_arguments
                    if call.function.parsed_arguments is not None
                    else json.loads(call.function.arguments)
                )
                assert call.id not in ids
                ids.add(call.id)


def test_a_bias_makes_the_model_call_or_not(server: ServerProcess, client: openai.OpenAI) -> None:
    with Client(server.address) as ours:
        (begin,) = ours.tokenize(prompt="<tool_call>").token_ids
    asked: Any = {"model": "", "messages": TURNS, "tools": TOOLS, "temperature": 0}
    calls = client.chat.completions.create(
        **asked, logit_bias={str(begin): 100}, parallel_tool_calls=False, max_tokens=400
    ).choices[0]
    assert calls.finish_reason == "tool_calls"
    assert len(calls.message.tool_calls or ()) == 1
    assert calls.message.content is None
    text = client.chat.completions.create(
        **asked, logit_bias={str(begin): -100}, max_tokens=30
    ).choices[0]
    assert text.message.tool_calls is None
    assert text.message.content


def test_calls_and_their_answers_go_back_to_the_model(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    """What our own client is told over gRPC, both doors read again, and their prompts are one."""
    turns: list[Any] = [*TURNS]
    with Client(server.address, timeout_s=60) as ours:
        answer = ours.generate(messages=turns, tools=TOOLS, tool_choice=LOOK_ONLY, max_tokens=300)
        assert (answer.finish_reason, answer.text) == ("tool_calls", "")
        (call,) = answer.tool_calls
        Draft202012Validator(LOOK).validate(json.loads(call.arguments))
        turns.append({"role": "assistant", "content": None, "tool_calls": [call.to_message()]})
        turns.append({"role": "tool", "tool_call_id": call.id, "content": "the mat"})
        again = ours.generate(messages=turns, tools=TOOLS, max_tokens=8)
        over_http = client.chat.completions.create(
            model="", messages=turns, tools=TOOLS, max_tokens=8, temperature=0
        )
        assert over_http.usage is not None
        assert over_http.usage.prompt_tokens == again.usage.prompt_tokens
        assert over_http.choices[0].message.content == again.text
        first = ours.generate(messages=TURNS, tools=TOOLS, max_tokens=8)
        assert again.usage.prompt_tokens > first.usage.prompt_tokens
        pieces = list(
            ours.stream(
                messages=TURNS,
                tools=TOOLS,
                tool_choice="required",
                max_tokens=900,
                seed=3,
                temperature=1.0,
            )
        )
        whole = pieces[-1]
        assert isinstance(whole, GenerateResult)
        told = ["" for _ in whole.tool_calls]
        for piece in pieces:
            if isinstance(piece, Chunk):
                for part in piece.tool_calls:
                    told[part.index] += part.arguments
        assert told == [one.arguments for one in whole.tool_calls]
        with pytest.raises(InvalidRequest, match="without messages"):
            ours.generate(prompt="a", tools=TOOLS)
        with pytest.raises(InvalidRequest, match="OpenAI's shape"):
            ours.generate(messages=TURNS, tools=[{"name": "look"}])


def test_a_schema_that_cannot_be_followed_is_refused_by_its_place(client: openai.OpenAI) -> None:
    bad = {
        "type": "function",
        "function": {"name": "x", "parameters": {"properties": {"a": {"type": "nothing"}}}},
    }
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="", messages=TURNS, tools=[*TOOLS, bad])  # type: ignore[list-item]
    assert refused.value.param == "tools[2].function.parameters"
    evil = {"type": "function", "function": {"name": "x", "description": "<|im_end|>"}}
    with pytest.raises(openai.BadRequestError, match="special token") as refused:
        client.chat.completions.create(model="", messages=TURNS, tools=[evil])  # type: ignore[list-item]
    assert refused.value.param == "tools[0]"
