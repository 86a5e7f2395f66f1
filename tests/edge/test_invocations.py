"""aLoRA over real sockets: what holds the invocation is served from there on, and nothing else is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from lorary.client import AsyncClient
from lorary.errors import IncompatibleAdapter, InvalidRequest, NotMergeable
from lorary.server.targets import Targets
from tests.edge.fakes import FINGERPRINT, FakeManifest, FakeRegistry, FakeResolved, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.edge.fakes import Edge


class Activated(FakeRegistry):
    """``alpha`` is an aLoRA with the invocation 7 8."""

    def manifest(self, resolved: FakeResolved) -> FakeManifest:
        found = super().manifest(resolved)
        if resolved.name != "alpha":
            return found
        method = dataclasses.replace(found.method, name="alora", invocation_tokens=(7, 8))
        return dataclasses.replace(found, method=method)


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with serving(registry=Activated()) as running:
        yield running


@pytest.fixture
async def client(edge: Edge) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(edge.address) as opened:
        yield opened


async def test_the_engine_is_told_where_the_adapter_begins(edge: Edge, client: AsyncClient) -> None:
    await client.generate(prompt="1 7 8 2 7 8", adapter="alpha", max_tokens=2)
    await client.generate("5 7 8", adapter="alpha", max_tokens=2)
    await client.classify("2 7 8 3", adapter="alpha", labels=["8", "10"])
    await client.generate(prompt="1 7 8", adapter="alpha", scale=0.5, max_tokens=2)
    await client.generate(prompt="1 7 8", max_tokens=2)
    await client.generate(prompt="1 7 8", adapter="beta", max_tokens=2)
    assert [r.active_from for r in edge.engine.submitted] == [4, 2, 2, 1, 0, 0]
    assert edge.residency.num_held == 0


async def test_a_prompt_without_the_invocation_is_refused_and_loads_nothing(
    edge: Edge, client: AsyncClient
) -> None:
    """PEFT would answer with the bare base, in silence."""
    for prompt in ("1 7", "8 7", "7 9 8"):
        with pytest.raises(InvalidRequest, match=r"lacks the invocation '7 8 '.*alpha@1.*aLoRA"):
            await client.generate(prompt=prompt, adapter="alpha", max_tokens=2)
    with pytest.raises(InvalidRequest, match="lacks the invocation"):
        await client.classify("1", adapter="alpha", labels=["8", "10"])
    assert edge.engine.submitted == []
    assert edge.residency.leases == []


async def test_it_is_no_part_of_a_sum(edge: Edge, client: AsyncClient) -> None:
    for adapters in ({"alpha": 0.5, "beta": 0.5}, {"beta": 1.0, "alpha": 0.1}):
        with pytest.raises(IncompatibleAdapter, match=r"'alpha@1' is an aLoRA.*no part of a sum"):
            await client.generate(prompt="7 8", adapters=adapters, max_tokens=2)
    await client.generate(prompt="1 7 8", adapters=[("alpha", 0.2), ("alpha", 0.3)], max_tokens=2)
    assert [r.active_from for r in edge.engine.submitted] == [1]


async def test_it_is_never_folded_into_the_base(edge: Edge, client: AsyncClient) -> None:
    with pytest.raises(NotMergeable, match="'alpha' is an aLoRA"):
        await client.generate(prompt="7 8", adapter="alpha", max_tokens=2, execution="merged")
    await client.generate(prompt="1 7 8", adapter="alpha", max_tokens=2, execution="batched")
    assert [r.active_from for r in edge.engine.submitted] == [1]


async def test_a_target_says_that_no_weights_compute_it() -> None:
    targets = Targets(Activated(), base="tiny", fingerprint=FINGERPRINT)
    try:
        assert (await targets.resolve("alpha")).is_activated
        assert not (await targets.resolve("beta")).is_activated
        assert not (await targets.resolve("")).is_activated
    finally:
        targets.close()
