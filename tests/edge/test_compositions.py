"""Several adapters in one call, over real sockets: what is asked, refused, proved and given back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lorary.cli.call import adapter_arguments
from lorary.client import AsyncClient
from lorary.errors import (
    AdapterNotFound,
    CorruptArtifact,
    IncompatibleAdapter,
    InvalidRequest,
    LoraryError,
)
from lorary.server.composition import MAX_PARTS, composition_digest
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import digest_of, eventually, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.edge.fakes import Edge

ALPHA, BETA = digest_of("alpha"), digest_of("beta")


@pytest.fixture
async def client(edge: Edge) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(edge.address) as opened:
        yield opened


async def test_the_receipt_lists_every_part(edge: Edge, client: AsyncClient) -> None:
    answer = await client.generate(
        prompt="2 5", adapters=[("beta@prod", 0.7), ("alpha@1", -0.25)], max_tokens=2
    )
    receipt = answer.receipt
    assert receipt.digest == composition_digest([(ALPHA, -0.25), (BETA, 0.699999988079071)])
    assert receipt.digest.startswith("mix:sha256:")
    assert (receipt.ref, receipt.name, receipt.version) == (
        "beta@prod*0.7+alpha@1*-0.25",
        "alpha+beta",
        0,
    )
    assert [(p.ref, p.name, p.version, p.digest) for p in receipt.parts] == [
        ("beta@prod", "beta", 1, BETA),
        ("alpha@1", "alpha", 1, ALPHA),
    ]
    assert [p.weight for p in receipt.parts] == pytest.approx([0.7, -0.25])
    assert edge.engine.submitted[0].lease.digest == receipt.digest
    assert edge.engine.submitted[0].account == BETA
    assert edge.residency.num_held == 0


async def test_the_digest_is_of_what_is_computed(client: AsyncClient) -> None:
    async def digest(**named: Any) -> str:
        answer = await client.generate(prompt="2", max_tokens=1, **named)
        return answer.receipt.digest

    both = await digest(adapters={"alpha": 0.5, "beta": 2.0})
    assert await digest(adapters=[("beta", 2.0), ("alpha@1", 0.5)]) == both
    assert await digest(adapters=[("beta", 1.5), ("alpha", 0.5), ("beta@prod", 0.5)]) == both
    assert await digest(adapters={"alpha": 0.5, "beta": 2.5}) != both
    # One part of weight 1 is that adapter as it is, and shares all that is kept for it.
    assert await digest(adapters={"alpha": 1.0}) == ALPHA
    assert await digest(adapters=[("alpha", 0.25), ("alpha@1", 0.75)]) == ALPHA
    assert await digest(adapter="alpha", scale=1.0) == ALPHA
    scaled = await digest(adapter="alpha", scale=0.5)
    assert scaled == await digest(adapters=[("alpha", 0.5)])
    assert scaled not in (ALPHA, both)


async def test_the_first_adapter_leads(client: AsyncClient) -> None:
    """Its labels, its template and its default length."""
    scored = await client.classify("5", adapters=[("beta", 0.5), ("alpha", 0.5)])
    assert set(scored.probabilities) == {"8", "10"}
    assert scored.receipt.parts[0].name == "beta"
    with pytest.raises(InvalidRequest, match="labels"):
        await client.classify("5", adapters=[("alpha", 0.5), ("beta", 0.5)])
    answer = await client.generate("5", adapters=[("alpha", 0.5), ("beta", 0.5)])
    assert answer.usage.completion_tokens == 5
    ids = (await client.tokenize("2 5", adapters=[("alpha", 0.5), ("beta", 0.5)])).token_ids
    assert ids == (100, 2, 5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"adapter": "alpha", "adapters": [("beta", 1.0)]}, "adapters"),
    ({"adapters": [("alpha", math.nan)]}, "adapters[0].weight"),
    ({"adapters": [("alpha", 1.0), ("beta", math.inf)]}, "adapters[1].weight"),
    ({"adapters": [("alpha", -16.5)]}, "adapters[0].weight"),
    ({"adapters": [("alpha", 1.0), ("", 1.0)]}, "adapters[1].adapter"),
    ({"adapters": [("alpha", 0.1)] * (MAX_PARTS + 1)}, "adapters"),
    ({"adapters": [("alpha", 1.0)], "scale": 0.5}, "scale"),
    ({"scale": 0.5}, "scale"),
    ({"adapter": "alpha", "scale": math.nan}, "scale"),
]


@pytest.mark.parametrize(("named", "field"), BAD)
async def test_what_makes_no_sense_is_refused_by_its_field(
    edge: Edge, client: AsyncClient, named: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await client.generate(prompt="2", **named)
    assert caught.value.field == field
    assert not edge.residency.leases


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ([("alpha", 0.5), ("nobody", 0.5)], AdapterNotFound),
        ([("alpha", 0.5), ("other-base", 0.5)], IncompatibleAdapter),
    ],
)
async def test_a_part_that_cannot_serve_refuses_the_call(
    edge: Edge, client: AsyncClient, named: Any, error: type[LoraryError]
) -> None:
    with pytest.raises(error):
        await client.generate(prompt="2", adapters=named)
    assert not edge.residency.leases


async def test_the_ranks_together_are_bounded() -> None:
    async with serving(max_rank=12) as edge, AsyncClient(edge.address) as client:
        with pytest.raises(IncompatibleAdapter, match=r"add up to 16.*at most 12"):
            await client.generate(prompt="2", adapters={"alpha": 0.5, "beta": 0.5})
        await client.generate(prompt="2", adapter="alpha", scale=0.5, max_tokens=1)


async def test_leases_come_back_whatever_ends_the_call(edge: Edge, client: AsyncClient) -> None:
    """A part that fails while the other waits, and a caller that leaves while one is on its way."""
    edge.residency.slow.add("beta")
    request = pb.GenerateRequest(
        input=pb.Input(prompt="2"),
        sampling=pb.SamplingParams(n=3),
        adapters=[pb.WeightedAdapter(adapter="alpha"), pb.WeightedAdapter(adapter="beta")],
    )
    call = edge.inference.Generate(request)
    await eventually(lambda: len(edge.engine.submitted) == 3)
    # No part that is there is held before all are; one on its way is, or its load would be given up.
    held = {lease.name for lease in edge.residency.leases if not lease.is_released}
    assert held == {"beta"}
    call.cancel()
    await eventually(lambda: edge.engine.num_waiting == 0)
    await eventually(lambda: edge.residency.num_held == 0)

    call = edge.inference.Generate(request)
    await eventually(lambda: len(edge.engine.submitted) == 6)
    edge.residency.fail("beta", CorruptArtifact("beta's bytes differ"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    await eventually(lambda: edge.engine.num_waiting == 0)
    await eventually(lambda: edge.residency.num_held == 0)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", {"adapter": ""}),
        ("a@prod", {"adapter": "a@prod"}),
        ("a@prod*0.5", {"adapter": "a@prod", "scale": 0.5}),
        ("a@prod*0.7+b@2*-.3", {"adapters": [("a@prod", 0.7), ("b@2", -0.3)]}),
        ("a + team/b * 2", {"adapters": [("a", 1.0), ("team/b", 2.0)]}),
    ],
)
def test_the_command_line_writes_sums(text: str, arguments: dict[str, Any]) -> None:
    assert adapter_arguments(text) == arguments


def test_the_command_line_names_a_wrong_weight() -> None:
    with pytest.raises(InvalidRequest, match="'half' in 'a\\*half'"):
        adapter_arguments("a*half")
