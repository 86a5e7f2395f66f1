"""Embed through every door: our protocol, both clients, the command line, OpenAI's client; ``fakes`` says what
each vector is."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import grpc
import openai
import pytest
import pytest_asyncio
from typer.testing import CliRunner

from lorary.cli.main import app
from lorary.client import AsyncClient, Client
from lorary.errors import AdapterNotFound, InvalidRequest, LoraryError, Overloaded
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import digest_of, eventually, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.edge.fakes import Edge

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge() -> AsyncIterator[Edge]:
    async with serving(http_port=0, max_message=64 * 1024) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(edge: Edge) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(edge.address) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def door(edge: Edge) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=edge.http + "/v1", api_key="unused", max_retries=0, timeout=10
    ) as opened:
        yield opened


async def test_each_input_has_its_vector_receipt_and_counts(
    edge: Edge, client: AsyncClient
) -> None:
    """The mean of [100, 2, 6] and of [100, 8] under beta, whose number is 2."""
    found = await client.embed(["2 6", "8"], adapter="beta@prod", priority=3, request_id="mine")
    assert [one.values for one in found] == [(36.0, 5.0, 0.0, 4.0), (54.0, 5.0, 0.0, 4.0)]
    assert [one.usage.prompt_tokens for one in found] == [3, 2]
    assert {one.receipt.digest for one in found} == {digest_of("beta")}
    assert {one.receipt.request_id for one in found} == {"mine"}
    assert {request.priority for request in edge.engine.submitted[-2:]} == {3}
    assert edge.residency.num_held == 0
    with Client(edge.address) as threads:
        again = await asyncio.to_thread(threads.embed, ["2 6"], adapter="beta@prod")
    assert again[0].values == found[0].values


async def test_pooling_dimensions_and_length_are_asked_for(client: AsyncClient) -> None:
    (last,) = await client.embed(
        token_ids=[[7, 3]], pooling="last", dimensions=2, normalize=True, adapter="alpha"
    )
    assert last.values == pytest.approx((0.6, 0.8))
    (prompt,) = await client.embed(prompts="7 3", pooling="last")
    assert prompt.values == (3.0, 3.0, 0.0, 4.0)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"prompts": []}, "inputs"),
        ({"prompts": ["5"] * 1025}, "inputs"),
        ({"prompts": ["5"] * 40}, "inputs"),  # more than a message of 64 KiB holds
        ({"prompts": ["5", ""]}, "inputs[1].prompt"),
        ({"texts": ["5"]}, "inputs[0].text"),  # the bare base has no template
        ({"token_ids": [[5], [5] * 64]}, "inputs[1]"),  # longer than the context
        ({"token_ids": [[1000]]}, "inputs[0].token_ids.ids[0]"),
        ({"prompts": ["5"], "dimensions": 5}, "dimensions"),
        ({"prompts": ["5"], "dimensions": 0}, "dimensions"),
        ({"prompts": ["5"], "dimensions": -1}, "dimensions"),
        ({"prompts": ["5"], "pooling": "max"}, "pooling"),
        ({"prompts": ["5"], "texts": ["5"]}, "inputs"),
        ({"prompts": ["5"], "priority": 11}, "priority"),
        ({"prompts": ["5"], "scale": 2.0}, "scale"),
        ({"prompts": ["5"], "execution": "merged"}, "execution"),
    ],
)
async def test_what_cannot_be_embedded_is_refused_by_its_field(
    edge: Edge, client: AsyncClient, asked: dict[str, Any], field: str
) -> None:
    submitted = len(edge.engine.submitted)
    with pytest.raises(InvalidRequest) as refused:
        await client.embed(**asked)
    assert refused.value.field == field
    assert len(edge.engine.submitted) == submitted or field == "inputs[1]"


async def test_a_pooling_of_tomorrow_is_refused(edge: Edge) -> None:
    request = pb.EmbedRequest(inputs=[pb.Input(prompt="5")])
    request.pooling = 9  # type: ignore[assignment]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await edge.inference.Embed(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_every_input_counts_as_a_call_and_ends_with_its_own() -> None:
    """Six places: five inputs take five; the client goes away, and all of them are cancelled."""
    async with serving(limit=6) as edge, AsyncClient(edge.address) as client:
        edge.residency.slow.add("alpha")
        five = asyncio.ensure_future(client.embed(prompts=["5"] * 5, adapter="alpha"))
        await eventually(lambda: len(edge.engine.submitted) == 5)
        assert edge.calls.num_in_flight == 5
        with pytest.raises(Overloaded):
            await client.embed(prompts=["5", "6"])
        assert len(await client.embed(prompts=["5"])) == 1
        with pytest.raises(InvalidRequest, match="takes 6 at once"):
            await client.embed(prompts=["5"] * 7)
        five.cancel()
        await eventually(lambda: edge.calls.num_in_flight == 0 and edge.residency.num_held == 0)
        assert len(edge.engine.cancelled) == 5


async def test_the_first_error_ends_the_call(edge: Edge, client: AsyncClient) -> None:
    edge.residency.slow.add("alpha")
    both = asyncio.ensure_future(client.embed(prompts=["5", "6"], adapter="alpha"))
    await eventually(lambda: edge.engine.num_waiting == 2)
    edge.residency.fail("alpha", LoraryError("it broke"))
    with pytest.raises(LoraryError):
        await both
    await eventually(lambda: edge.residency.num_held == 0)
    edge.residency.slow.clear()
    edge.residency.leases.clear()
    edge.residency.num_released = 0
    await eventually(lambda: edge.calls.num_in_flight == 0)


async def test_openais_client_gets_unit_vectors_in_both_encodings(
    edge: Edge, door: openai.AsyncOpenAI
) -> None:
    """The client asks for base64 unless told otherwise; [12, 3, 0, 4] has length 13."""
    options: list[dict[str, Any]] = [{}, {"encoding_format": "float"}]
    for extra in options:
        answer = await door.embeddings.create(
            model="", input=["12", "12 12"], extra_body={"pooling": "last"}, **extra
        )
        for i, one in enumerate(answer.data):
            assert (one.index, one.object) == (i, "embedding")
            assert one.embedding == pytest.approx([12 / 13, 3 / 13, 0, 4 / 13])
        assert (answer.model, answer.object) == ("tiny", "list")
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)


async def test_openais_members_reach_the_engine(edge: Edge, door: openai.AsyncOpenAI) -> None:
    raw = await door.embeddings.with_raw_response.create(
        model="beta@prod",
        input="2 5",
        dimensions=2,
        user="ada",
        extra_body={"normalize": False, "use_template": True, "priority": 2},
    )
    answer = raw.parse()
    assert answer.data[0].embedding == pytest.approx([107 / 3, 5.0])
    assert answer.model_extra is not None
    assert answer.model_extra["lorary"]["digest"] == digest_of("beta")
    assert raw.headers["x-lorary-digest"] == digest_of("beta")
    request = edge.engine.submitted[-1]
    assert (request.prompt_ids, request.priority) == ([100, 2, 5], 2)
    one = await door.embeddings.create(model="beta", input=[5, 7])
    many = await door.embeddings.create(model="beta", input=[[5, 7], [9]])
    assert (len(one.data), len(many.data)) == (1, 2)
    assert one.data[0].embedding == many.data[0].embedding


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["5", ""]}, "input[1]"),
        ({"input": "5", "dimensions": 9}, "dimensions"),
        ({"input": "5", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "5", "pooling": "cls"}, "pooling"),
        ({"input": [[5]], "use_template": True}, "use_template"),
        ({"input": [[5, -1]]}, "input[0]"),
        ({"input": "5", "temperature": 1}, "temperature"),
        ({"input": "5", "model": "nobody"}, "model"),
    ],
)
async def test_openais_errors_name_the_member(
    door: openai.AsyncOpenAI, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await door.post("/embeddings", body={"model": "", **body}, cast_to=object)
    assert (refused.value.status_code, refused.value.param) == (
        404 if param == "model" else 400,
        param,
    )


async def test_a_shell_gets_a_vector_a_line(edge: Edge) -> None:
    def run(*arguments: str, given: str = "") -> Any:
        return CliRunner().invoke(app, ["embed", *arguments, "--target", edge.address], input=given)

    plain = await asyncio.to_thread(run, "alpha", "--pooling", "last", given="7 8\n9\n")
    assert [json.loads(line) for line in plain.stdout.splitlines()] == [
        [8.0, 4.0, 0.0, 4.0],
        [9.0, 4.0, 0.0, 4.0],
    ]
    told = await asyncio.to_thread(run, "beta@prod", "2 5", "--template", "--json")
    assert json.loads(told.stdout)[0]["receipt"]["digest"] == digest_of("beta")
    unknown = await asyncio.to_thread(run, "nobody", "5")
    assert isinstance(unknown.exception, AdapterNotFound)
