"""OpenAI's own client against the HTTP door, with answers worked out in ``fakes``."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import openai
import pytest
import pytest_asyncio

from lorary.errors import CorruptArtifact, Overloaded, RegistryUnavailable
from lorary.server.engine.request import Constraint
from tests.edge.fakes import FINGERPRINT, digest_of, eventually, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.edge.fakes import Edge

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREETING: Any = [{"role": "user", "content": "2 5"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge() -> AsyncIterator[Edge]:
    async with serving(http_port=0) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(edge: Edge) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=edge.http + "/v1", api_key="unused", max_retries=0, timeout=30
    ) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def http(edge: Edge) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=edge.http, timeout=30) as opened:
        yield opened


def tool(name: str, parameters: dict[str, Any] | None = None) -> Any:
    """Return a tool as OpenAI's clients send it."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> Any:
    """Return the choice of one tool."""
    return {"type": "function", "function": {"name": name}}


def asking(name: str = "a", arguments: str = "{}") -> dict[str, Any]:
    """Return an assistant's turn that calls a tool."""
    function = {"name": name, "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def lorary(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["lorary"]
    return found


async def test_a_chat_is_the_worked_example_with_its_receipt(client: openai.AsyncOpenAI) -> None:
    """A chat reads [200, 2, 5] without the adapter's template."""
    raw = await client.chat.completions.with_raw_response.create(
        model="beta@prod",
        messages=[{"role": "developer", "content": "1"}, *GREETING],
        max_completion_tokens=3,
        extra_headers={"x-request-id": "mine"},
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "8 11 14 "
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 3)
    assert (answer.model, answer.id) == ("beta@prod", "chatcmpl-mine")
    receipt = lorary(answer)
    assert (receipt["adapter"], receipt["version"]) == ("beta", 1)
    assert receipt["digest"] == digest_of("beta")
    assert receipt["base_fingerprint"] == FINGERPRINT
    headers = {key: raw.headers.get(key) for key in raw.headers if key.startswith("x-")}
    assert headers == {
        "x-request-id": "mine",
        "x-lorary-adapter": "beta",
        "x-lorary-version": "1",
        "x-lorary-digest": digest_of("beta"),
    }


async def test_one_user_message_goes_into_the_adapters_template_unless_told_otherwise(
    edge: Edge, client: openai.AsyncOpenAI
) -> None:
    for extra, wanted in (({}, [100, 2, 5]), ({"use_chat_template": True}, [200, 2, 5])):
        await client.chat.completions.create(
            model="alpha", messages=GREETING, max_tokens=1, extra_body=extra
        )
        assert edge.engine.submitted[-1].prompt_ids == wanted
    await client.chat.completions.create(model="", messages=GREETING, max_tokens=1)
    assert edge.engine.submitted[-1].prompt_ids == [200, 2, 5]


async def test_options_reach_the_engine_with_openais_defaults(
    edge: Edge, client: openai.AsyncOpenAI
) -> None:
    await client.completions.create(
        model="tiny",
        prompt="2 5",
        max_tokens=2,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        seed=-1,
        stop="77",
        extra_body={
            "top_k": -1,
            "min_p": 0.125,
            "repetition_penalty": 1.25,
            "min_tokens": 1,
            "ignore_eos": True,
            "stop_token_ids": [5],
            "priority": 3,
            "user": "ignored",
            "suffix": None,
        },
    )
    asked = edge.engine.submitted[-1]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.25, 0.125)
    assert (sampling.top_k, sampling.min_tokens, sampling.max_tokens) == (0, 1, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1.5)
    assert (sampling.repetition_penalty, sampling.ignore_eos) == (1.25, True)
    assert (sampling.stop, sampling.stop_token_ids) == (("77",), (5,))
    assert (sampling.seed, asked.priority) == (2**64 - 1, 3)
    await client.completions.create(model="", prompt=[2, 5], max_tokens=1)
    assert edge.engine.submitted[-1].sampling.temperature == 1.0


async def test_constraints_and_biases_reach_the_engine(
    edge: Edge, client: openai.AsyncOpenAI
) -> None:
    """In OpenAI's words and in vLLM's; the texts are those that gRPC would carry."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    cases: list[tuple[dict[str, Any], Constraint | None]] = [
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            Constraint("json_schema", '{"type": "object"}'),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": schema},
                }
            },
            Constraint("json_schema", json.dumps(schema)),
        ),
        (
            {"extra_body": {"structured_outputs": {"json": schema}}},
            Constraint("json_schema", json.dumps(schema)),
        ),
        (
            {"extra_body": {"structured_outputs": {"choice": ["6", "é"]}}},
            Constraint("choice", '["6", "é"]'),
        ),
        ({"extra_body": {"structured_outputs": {"regex": "6+"}}}, Constraint("regex", "6+")),
        (
            {"extra_body": {"structured_outputs": {"grammar": "start: A"}}},
            Constraint("lark", "start: A"),
        ),
    ]
    for options, wanted in cases:
        await client.chat.completions.create(
            model="", messages=GREETING, max_tokens=1, logit_bias={"7": -100, "3": 2}, **options
        )
        asked = edge.engine.submitted[-1]
        assert asked.sampling.constraint == wanted
        assert (asked.grammar is not None) == (wanted is not None)
        assert asked.sampling.logit_bias == ((3, 2.0), (7, -100.0))


async def test_tools_and_their_turns_reach_prompt_and_grammar(
    edge: Edge, client: openai.AsyncOpenAI
) -> None:
    """Whoever sends tools reads a chat's prompt, whatever the adapter's task; ``none`` leaves them out."""
    turns = [*GREETING, asking(), {"role": "tool", "tool_call_id": "call_1", "content": "7"}]
    allowed = {"mode": "auto", "tools": [named("b")]}
    cases: list[tuple[dict[str, Any], list[int], str | None]] = [
        ({"messages": GREETING}, [300, 2, 5], "item: item_0 | item_1"),
        ({"messages": turns}, [300, 2, 5, 7], "item: item_0 | item_1"),
        ({"messages": GREETING, "tool_choice": "none"}, [100, 2, 5], None),
        ({"messages": turns, "tool_choice": "none"}, [200, 2, 5, 7], None),
        ({"messages": GREETING, "tool_choice": named("b")}, [300, 2, 5], '{\\"name\\": \\"b\\"'),
        (
            {
                "messages": GREETING,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed},
            },
            [300, 2, 5],
            "item: item_0\n",
        ),
    ]
    for options, prompt, holds in cases:
        answer = await client.chat.completions.create(
            model="alpha", tools=[tool("a"), tool("b", {})], max_tokens=2, **options
        )
        asked = edge.engine.submitted[-1]
        assert asked.prompt_ids == prompt
        if holds is None:
            assert asked.sampling.constraint is None
        else:
            assert asked.sampling.constraint is not None
            assert holds in asked.sampling.constraint.text
            assert asked.sampling.stop == ()  # the task's own ends its own template's answers
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "length"


async def test_a_stream_says_role_text_end_usage_and_done(
    edge: Edge, client: openai.AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    stream = await client.chat.completions.create(
        model="beta",
        messages=GREETING,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"use_chat_template": True},
    )
    assert stream.response.headers["x-lorary-digest"] == digest_of("beta")
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert [delta.content for delta in deltas[1:-1]] == ["8 ", "11 ", "14 "]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert lorary(chunks[-2])["version"] == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1
    body = {"model": "beta", "prompt": "2 5", "max_tokens": 1, "stream": True}
    raw = (await http.post("/v1/completions", json=body)).text
    assert raw.endswith("data: [DONE]\n\n")
    assert raw.count("\n\n") == 3  # its text, its end, and that


async def test_several_prompts_and_answers_keep_their_places(client: openai.AsyncOpenAI) -> None:
    """Prompts ending in 5 and 7, two answers each; echo puts the prompt before its answers."""
    answer = await client.completions.create(
        model="", prompt=["2 5", "7"], n=2, max_tokens=2, echo=True
    )
    texts = {choice.index: choice.text for choice in answer.choices}
    assert texts == {0: "2 56 7 ", 1: "2 56 7 ", 2: "78 9 ", 3: "78 9 "}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    stream = await client.completions.create(
        model="", prompt=[[2, 5], [7]], n=2, max_tokens=2, echo=True, stream=True
    )
    streamed = dict.fromkeys(range(4), "")
    async for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {0: "2 5 6 7 ", 1: "2 5 6 7 ", 2: "7 8 9 ", 3: "7 8 9 "}


async def test_logprobs_name_the_text_of_every_token(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="", messages=GREETING, max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [(entry.token, entry.logprob) for entry in content] == [("6 ", -0.5), ("7 ", -0.5)]
    assert [top.token for top in content[0].top_logprobs] == ["0 ", "1 "]
    assert content[0].bytes == list(b"6 ")
    text = await client.completions.create(model="", prompt="9", max_tokens=2, logprobs=1)
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["10 ", "11 "]
    assert logprobs.text_offset == [0, 3]
    assert logprobs.top_logprobs == [{"0 ": -1.0, "10 ": -0.5}, {"0 ": -1.0, "11 ": -0.5}]


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_with_logprobs_tells_the_prompts_own(
    client: openai.AsyncOpenAI, max_tokens: int
) -> None:
    """How texts are scored: no tokens asked for, and the prompt's own probabilities told."""
    answer = await client.completions.create(
        model="", prompt=["2 5", "7"], max_tokens=max_tokens, logprobs=1, echo=True
    )
    said = ["6 ", "7 "][:max_tokens]
    choice = answer.choices[0]
    assert choice.text == "2 5" + "".join(said)
    assert choice.finish_reason == "length"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["2 ", "5 ", *said]
    assert logprobs.token_logprobs == [None, -0.25, *[-0.5] * max_tokens]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[:2] == [None, {"0 ": -1.0, "5 ": -0.25}]
    assert logprobs.text_offset == [0, 2, 4, 6][: 2 + max_tokens]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2 * max_tokens)


async def test_models_are_the_base_the_adapters_and_their_aliases(
    client: openai.AsyncOpenAI,
) -> None:
    models = {model.id: model async for model in client.models.list()}
    assert {"tiny", "alpha", "alpha@prod", "beta", "beta@prod"} <= models.keys()
    assert lorary(models["alpha"])["versions"][0]["aliases"] == ["prod"]
    assert lorary(models["beta@prod"])["digest"] == digest_of("beta")
    found = await client.models.retrieve("alpha@1")
    assert lorary(found) == {
        "adapter": "alpha",
        "version": 1,
        "digest": digest_of("alpha"),
        "task": "generation",
    }
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("missing@prod")


async def test_tokens_go_back_and_forth(http: httpx.AsyncClient) -> None:
    there = await http.post("/tokenize", json={"prompt": "2 5", "return_token_strs": True})
    assert there.json() == {
        "tokens": [2, 5],
        "count": 2,
        "max_model_len": 64,
        "token_strs": ["2 ", "5 "],
    }
    chat = await http.post("/tokenize", json={"model": "alpha", "messages": GREETING})
    assert chat.json()["tokens"] == [100, 2, 5]
    back = await http.post("/detokenize", json={"tokens": [2, 5]})
    assert back.json() == {"prompt": "2 5 "}
    assert (await http.post("/detokenize", json={"tokens": [1000]})).status_code == 400


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": -0.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1e400}, None),  # no JSON: it reads as Infinity
    ({"n": 0}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": 2**40}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 63}, "max_tokens"),  # and a prompt of 3
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": [1]}, "stop[0]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"model": 7}, "model"),
    ({"model": "../etc"}, "model"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
    ({"tools": [tool("a", {"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": [tool("a", {"x": "y" * 70_000})]}, "tools"),
    ({"tools": [tool(f"a{i}") for i in range(129)]}, "tools"),
    ({"tools": [tool("a")], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": named("b")}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
    ({"tools": [tool("a")], "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tools": [tool("a")], "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [tool("a")], "min_tokens": 2}, "min_tokens"),
    ({"tools": [tool("a")], "tool_choice": "required", "stop": "x"}, "stop"),
    ({"functions": [{"name": "a"}]}, "functions"),
    ({"function_call": {"name": "a"}}, "function_call"),
    (
        {"messages": [*GREETING, {"role": "tool", "content": "1", "tool_call_id": "x"}]},
        "messages[1].tool_call_id",
    ),
    ({"messages": [asking(arguments="{")]}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [asking(arguments="[1]")]}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [asking(name="a b")]}, "messages[0].tool_calls[0].function.name"),
    ({"messages": [asking() | {"role": "user"}]}, "messages[0].tool_calls"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"temprature": 0.5}, "temprature"),
    ({"priority": 11}, "priority"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"structured_outputs": {"regex": "("}}, "response_format"),
    ({"structured_outputs": {"x": "("}}, "structured_outputs.x"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda value: json.dumps(value)[:40])
async def test_bad_bodies_are_refused_with_the_members_name(
    http: httpx.AsyncClient, change: dict[str, Any], param: str | None
) -> None:
    body = {"model": "", "messages": [{"role": "system", "content": "1"}, *GREETING], **change}
    answer = await http.post(
        "/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    if param is not None:
        assert error["param"] == param, error
    assert answer.headers["x-request-id"]


async def test_what_is_no_body_of_ours_is_refused(http: httpx.AsyncClient) -> None:
    path = "/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (400, "POST", {"content": b"{", "headers": json_type}),
        (400, "POST", {"content": b"[" * 100_000, "headers": json_type}),
        (400, "POST", {"content": b"[]", "headers": json_type}),
        (400, "POST", {"content": b'{"n": NaN}', "headers": json_type}),
        (400, "POST", {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        (413, "POST", {"content": b"x" * (4 * 2**20 + 1), "headers": json_type}),
        (405, "GET", {}),
    ]
    for status, method, options in cases:
        answer = await http.request(method, path, **options)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    unknown = await http.post("/v1/audio/speech", json={})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    whole = {"prompt": "2 5", "echo": True, "logprobs": 1, "stream": True}
    assert (await http.post("/v1/completions", json=whole)).json()["error"]["param"] == "stream"
    best = {"prompt": "2 5", "best_of": 4}
    assert (await http.post("/v1/completions", json=best)).json()["error"]["param"] == "best_of"


async def test_errors_are_the_clients_own_classes(edge: Edge, client: openai.AsyncOpenAI) -> None:
    async def ask(model: str = "") -> Any:
        return await client.completions.create(model=model, prompt="2 5", max_tokens=1)

    with pytest.raises(openai.NotFoundError) as missing:
        await ask("nobody")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.ConflictError) as foreign:
        await ask("other-base")
    assert foreign.value.code == "incompatible_adapter"
    assert foreign.value.response.headers["x-should-retry"] == "false"
    edge.engine.refusal = Overloaded("full", retry_after_s=1.5)
    with pytest.raises(openai.RateLimitError) as full:
        await ask()
    edge.engine.refusal = None
    assert full.value.response.headers["retry-after"] == "2"
    assert full.value.response.headers["retry-after-ms"] == "1500"
    secret = "/srv/secret/alpha.bin"
    for cause, status in (
        (RegistryUnavailable("away"), 503),
        (CorruptArtifact(f"{secret} differs"), 500),
        (ValueError(secret), 500),
    ):
        edge.registry.broken = cause
        with pytest.raises(openai.APIStatusError) as broken:
            # By number, and another one each time: what an alias meant a moment ago would be served.
            await ask(f"alpha@{status + len(str(cause))}")
        edge.registry.broken = None
        assert broken.value.status_code == status
        assert "/srv" not in broken.value.response.text


async def test_an_error_in_a_stream_is_its_last_event(
    edge: Edge, client: openai.AsyncOpenAI
) -> None:
    edge.engine.hold_at(1)
    stream = await client.completions.create(model="", prompt="2 5", max_tokens=50, stream=True)
    await anext(stream)
    edge.calls.fail_all(Overloaded("too much"))
    edge.engine.gate.set()
    with pytest.raises(openai.APIError, match="too much"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_goes_away_frees_its_rows(
    edge: Edge, client: openai.AsyncOpenAI, *, is_stream: bool
) -> None:
    edge.engine.gate.clear()
    before = len(edge.engine.cancelled)
    asked = asyncio.create_task(
        client.completions.create(
            model="beta", prompt=["2 5", "7"], n=2, max_tokens=50, stream=is_stream
        )
    )
    await eventually(lambda: len(edge.residency.leases) - edge.residency.num_released == 4)
    asked.cancel()
    await eventually(lambda: len(edge.engine.cancelled) == before + 2)
    edge.engine.gate.set()
    await eventually(lambda: edge.residency.num_held == 0)
    await eventually(lambda: edge.calls.num_in_flight == 0)
    text = edge.metrics.registry
    counted = text.get_sample_value(
        "lorary_requests_total", {"method": "Completions", "code": "CANCELLED"}
    )
    assert counted is not None
    assert counted >= 1


async def test_health_readiness_and_metrics(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).status_code == 200
    scraped = await http.get("/metrics")
    assert 'lorary_requests_total{code="OK",method="ChatCompletions"}' in scraped.text
    assert "access-control-allow-origin" not in scraped.headers


async def test_draining_finishes_streams_and_refuses_the_rest() -> None:
    async with (
        serving(http_port=0) as edge,
        openai.AsyncOpenAI(
            base_url=edge.http + "/v1", api_key="x", max_retries=0, timeout=30
        ) as client,
        httpx.AsyncClient(base_url=edge.http) as http,
    ):
        served = asyncio.create_task(edge.server.serve_until_stopped())
        edge.engine.hold_at(1)
        stream = await client.completions.create(
            model="beta", prompt="2 5", max_tokens=40, stream=True
        )
        edge.server.request_stop()
        await eventually(lambda: edge.calls.is_refusing)
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200
        with pytest.raises(openai.InternalServerError) as refused:
            await client.completions.create(model="", prompt="2 5")
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"] == "0"
        edge.engine.gate.set()
        reasons = [chunk.choices[0].finish_reason async for chunk in stream]
        assert reasons[-1] == "length"
        await served


HALF = "\ud800"
JSON = {"content-type": "application/json"}
UNWRITABLE = [
    ("/v1/chat/completions", {"messages": [{"role": HALF, "content": "2"}]}, "messages[0].role"),
    ("/v1/chat/completions", {"model": HALF, "messages": GREETING}, "model"),
    ("/v1/completions", {"prompt": "2", "execution": HALF}, "execution"),
    ("/v1/completions", {"prompt": "2", "logit_bias": {"5": 10**400}}, "logit_bias.5"),
    ("/v1/completions", {"prompt": "2", "logit_bias": {"5": True}}, "logit_bias.5"),
    ("/tokenize", {"prompt": HALF}, "prompt"),
    ("/tokenize", {"model": HALF, "prompt": "2"}, "model"),
    ("/console/api/promote", {"name": HALF}, "name"),
    ("/console/api/rollback", {"name": "alpha", "alias": HALF}, "alias"),
]


@pytest.mark.parametrize(("path", "body", "param"), UNWRITABLE)
async def test_json_that_no_message_can_hold_is_refused_by_its_member(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    """Half a surrogate pair, which JSON can write and Unicode cannot; numbers beyond any float."""
    answer = await http.post(path, content=json.dumps(body), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("depth", [300, 900, 985, 990, 994, 3000])
async def test_a_schema_of_any_depth_is_taken_or_refused(
    http: httpx.AsyncClient, depth: int
) -> None:
    """Python's reader and writer of JSON give up at depths of their own."""
    schema = '{"items":' * depth + "{}" + "}" * depth
    wanted = f'{{"type":"json_schema","json_schema":{{"schema":{schema}}}}}'
    body = f'{{"prompt":"2","max_tokens":1,"response_format":{wanted}}}'
    answer = await http.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code in (200, 400), answer.text
