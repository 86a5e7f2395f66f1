"""Aliases and canaries of a real registry under a server on real sockets; engine and device are fakes."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorary.errors import CorruptArtifact, LoraryError
from lorary.registry import BaseCard, Registry
from lorary.registry.splits import Canary, Gates
from lorary.v1 import control_pb2 as control
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import FakeLease, FakeResidency, eventually, serving
from tests.registry.conftest import Forge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.edge.fakes import Edge, FakeResolved

POLL_S = 0.02


@dataclass
class VersionedResidency(FakeResidency):
    """Versions in ``broken`` fail to load; those in ``poisoned`` load, and fail every call."""

    absent: set[int] = field(default_factory=set)
    broken: dict[int, LoraryError] = field(default_factory=dict)
    poisoned: dict[int, LoraryError] = field(default_factory=dict)
    listener: Callable[[str, Any, str], object] = lambda *_: None

    def acquire(self, resolved: FakeResolved) -> FakeLease:
        lease = super().acquire(resolved)
        version = resolved.version
        lease.is_ready = version not in self.absent and version not in self.broken
        # A load only looks at the error of what is not ready, the engine at every error.
        lease.error = self.broken.get(version) or self.poisoned.get(version)
        return lease

    def come(self, version: int, digest: str) -> None:
        self.absent.discard(version)
        for lease in self.leases:
            lease.is_ready = lease.is_ready or lease.digest == digest

    def listen(self, listener: Callable[[str, Any, str], object]) -> None:
        self.listener = listener


@pytest.fixture(scope="module")
def card(tiny_base: Path) -> BaseCard:
    return BaseCard.from_folder(tiny_base)


@pytest.fixture
def registry(card: BaseCard, tmp_path: Path) -> Registry:
    """Adapter ``a`` with versions 1 and 2; ``prod`` is at 1."""
    forge = Forge(card=card, root=tmp_path / "adapters")
    opened = Registry.open(tmp_path / "registry", create=True)
    for seed in (1, 2):
        opened.push(forge.folder(str(seed), seed=seed), "a", base=card)
    opened.set_alias("a", "prod", 1)
    return opened


@asynccontextmanager
async def following(registry: Registry, card: BaseCard) -> AsyncIterator[Edge]:
    async with serving(
        registry=Registry.open(registry.url),
        residency=VersionedResidency(),
        fingerprint=card.fingerprint,
        alias_poll=POLL_S,
    ) as edge:
        yield edge


@pytest_asyncio.fixture
async def edge(registry: Registry, card: BaseCard) -> AsyncIterator[Edge]:
    async with following(registry, card) as running:
        yield running


async def ask(edge: Edge, user: str = "", ref: str = "a@prod", tokens: int = 1) -> pb.Receipt:
    request = pb.GenerateRequest(
        adapter=ref,
        input=pb.Input(prompt="2 5"),
        sampling=pb.SamplingParams(max_tokens=tokens),
        routing_key=user,
    )
    events: list[pb.GenerateResponse] = [e async for e in edge.inference.Generate(request)]
    return events[-1].complete.receipt


async def asked_until(edge: Edge, version: int) -> None:
    async with asyncio.timeout(30):
        while (await ask(edge)).version != version:
            pass


def sample(edge: Edge, name: str, **labels: str) -> float:
    value = edge.metrics.registry.get_sample_value(name, labels)
    return 0.0 if value is None else value


async def test_new_calls_wait_for_nothing_and_turn_when_the_version_is_there(
    edge: Edge, registry: Registry
) -> None:
    residency = edge.residency
    assert isinstance(residency, VersionedResidency)
    assert (await ask(edge)).version == 1
    watch = edge.control.Watch(control.WatchRequest())
    assert (await watch.read()).WhichOneof("what") == "snapshot"
    residency.absent.add(2)
    registry.set_alias("a", "prod", 2)
    second = registry.resolve("a@2").digest
    await eventually(lambda: any(lease.digest == second for lease in residency.leases))
    assert [(await ask(edge)).version for _ in range(5)] == [1] * 5
    edge.engine.gate.clear()
    running = asyncio.create_task(ask(edge, tokens=3))
    await eventually(lambda: edge.engine.num_running == 1)
    residency.come(2, second)
    await eventually(lambda: sample(edge, "lorary_alias_turns_total", result="ok") == 1)
    edge.engine.gate.set()
    assert (await running).version == 1, "running calls end on what they began with"
    assert (await ask(edge)).version == 2
    event = (await watch.read()).event
    assert (event.kind, event.version) == (control.EVENT_KIND_ALIAS_MOVED, 2)
    assert (event.alias, event.detail) == ("prod", "from version 1")
    watch.cancel()
    await eventually(lambda: residency.num_held == 0)


async def test_a_version_that_cannot_be_loaded_leaves_calls_where_they_are(
    edge: Edge, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(edge.residency, VersionedResidency)
    await ask(edge)
    edge.residency.broken[2] = CorruptArtifact("a tensor is damaged")
    registry.set_alias("a", "prod", 2)
    await eventually(lambda: sample(edge, "lorary_aliases_behind") == 1)
    assert (await ask(edge)).version == 1
    listed = await edge.control.ListAdapters(control.ListAdaptersRequest())
    assert [(b.ref, b.version, b.reason) for b in listed.behind] == [
        ("a@prod", 1, "a tensor is damaged")
    ]
    await asyncio.sleep(5 * POLL_S)
    told = [r.message for r in caplog.records if "stays at version 1" in r.message]
    assert len(told) == 1, "said once, and not at every look"
    del edge.residency.broken[2]
    registry.set_alias("a", "prod", 1)
    await eventually(lambda: sample(edge, "lorary_aliases_behind") == 0)
    registry.set_alias("a", "prod", 2)
    await asked_until(edge, 2)


async def test_while_the_registry_is_away_what_is_known_keeps_serving(
    edge: Edge, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    stub: Any = health_pb2_grpc.HealthStub
    health = stub(edge.channel).Watch(health_pb2.HealthCheckRequest(service="lorary.registry"))
    serving_, away = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    assert (await health.read()).status == serving_
    assert (await ask(edge)).version == 1
    assert (await ask(edge, ref="a@2")).version == 2
    folder = registry.url.removeprefix("file://")
    away_folder = folder + "-gone"
    os.rename(folder, away_folder)
    assert (await health.read()).status == away
    assert sample(edge, "lorary_registry_up") == 0
    assert (await ask(edge)).version == 1
    assert (await ask(edge, ref="a@2")).version == 2
    listed = await edge.control.ListAdapters(control.ListAdaptersRequest(resident_only=True))
    assert [a.version for a in listed.adapters] == [1, 2]
    assert "No such file" in listed.registry_trouble
    os.rename(away_folder, folder)
    assert (await health.read()).status == serving_
    registry.set_alias("a", "prod", 2)
    await asked_until(edge, 2)
    said = [r.message for r in caplog.records if "registry is" in r.message]
    assert len(said) == 2, said
    health.cancel()


async def test_of_two_servers_whose_gate_fails_one_writes_the_line(
    registry: Registry, card: BaseCard, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    canary = Canary(version=2, percent=50, gates=Gates(calls=4, errors=0.1))
    async with AsyncExitStack() as stack:
        edges = [await stack.enter_async_context(following(registry, card)) for _ in range(2)]
        for edge in edges:
            await ask(edge)
        registry.rollouts.start("a", "prod", canary, actor="ada")
        for edge in edges:
            share = {"adapter": "a", "alias": "prod", "version": "2", "how": "answers"}
            await eventually(lambda e=edge, s=share: sample(e, "lorary_canary_percent", **s) == 50)  # type: ignore[misc]
            assert isinstance(edge.residency, VersionedResidency)
            edge.residency.poisoned[2] = CorruptArtifact("garbage")

        async def hammer(edge: Edge) -> int:
            errors = 0
            for user in range(30):
                try:
                    await ask(edge, f"user-{user}")
                except grpc.aio.AioRpcError as error:
                    errors += error.code() == grpc.StatusCode.DATA_LOSS
            return errors

        # It ends here and there with its fourth failure, whether or not the line is written yet;
        # a server that is slower than its neighbour's line ends it then, and tries to write none.
        errors = await asyncio.gather(*map(hammer, edges))
        assert max(errors) == 4
        num_lost = int(min(errors) == 4)

        def ended() -> list[list[float]]:
            return sorted(
                [
                    sample(edge, "lorary_canaries_ended_total", result=result)
                    for result in ("failed", "promoted", "lost")
                ]
                for edge in edges
            )

        # The line is written beside the calls.
        await eventually(lambda: ended() == [[0, 0, num_lost], [1, 0, 0]])
    began, end = registry.log("a", "prod")[1:]
    assert (began.actor, end.kind, end.to_version, end.canary) == ("ada", "canary", 1, None)
    assert end.actor.startswith("server ")
    assert end.reason.startswith("gate errors: 100.0% of 4 calls failed, 0.0% of the holder's")
    assert "CorruptArtifact: garbage" in end.reason


async def test_a_canary_that_cannot_be_loaded_gets_no_call_and_its_gates_end_it(
    edge: Edge, registry: Registry
) -> None:
    assert isinstance(edge.residency, VersionedResidency)
    await ask(edge)
    edge.residency.broken[2] = CorruptArtifact("a tensor is damaged")
    registry.rollouts.start("a", "prod", Canary(version=2, percent=100))
    follower = edge.server._core.rollout.follower
    await eventually(lambda: any(trial.problem for trial in follower.trials))
    place = {"adapter": "a", "alias": "prod", "version": "2", "how": "answers"}
    assert sample(edge, "lorary_canary_percent", **place) == 0
    assert (await ask(edge)).version == 1
    assert registry.rollouts.of("a", "prod") is not None, "without gates nobody but people ends it"
    gated = Canary(version=2, percent=100, gates=Gates(errors=0.1))
    registry.rollouts.start("a", "prod", gated)
    await eventually(lambda: registry.rollouts.of("a", "prod") is None)
    assert "version 2 cannot be loaded: a tensor is damaged" in registry.log("a")[-1].reason


async def test_an_alias_moves_through_control_only_from_where_it_is_expected(
    edge: Edge, registry: Registry
) -> None:
    await ask(edge)
    move = control.SetAliasRequest(name="a", alias="prod", version=2, expect_version=2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.control.SetAlias(move)
    assert caught.value.code() == grpc.StatusCode.ABORTED
    move.expect_version = 1
    moved = await edge.control.SetAlias(move)
    assert (moved.from_version, moved.to_version) == (1, 2)
    await asked_until(edge, 2)
    assert registry.log("a")[-1].actor.startswith("server ")
    gone = control.SetAliasRequest(name="a", alias="prod", actor="ada")
    assert (await edge.control.SetAlias(gone)).to_version == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(edge)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_forced_unload_ends_the_calls_of_that_version_only(
    edge: Edge, registry: Registry
) -> None:
    edge.engine.gate.clear()
    calls = [asyncio.create_task(ask(edge, ref=f"a@{version}")) for version in (1, 2)]
    await eventually(lambda: len(edge.engine.submitted) == 2)
    request = control.UnloadAdapterRequest(adapter="a@1", mode=control.UNLOAD_MODE_FORCE)
    await edge.control.UnloadAdapter(request)
    with pytest.raises(grpc.aio.AioRpcError, match="unloaded by force"):
        await calls[0]
    edge.engine.gate.set()
    assert (await calls[1]).version == 2
    await eventually(lambda: edge.residency.num_held == 0)


async def test_unknown_refs_leave_nothing_behind(edge: Edge) -> None:
    for number in range(300):
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(edge, ref=f"nobody-{number}@prod")
    assert sample(edge, "lorary_aliases_followed") == 0


async def test_copies_are_compared_counted_and_never_answered(
    edge: Edge, registry: Registry
) -> None:
    assert isinstance(edge.residency, VersionedResidency)
    await ask(edge)
    gates = Gates(calls=3, errors=0.1)
    registry.rollouts.start("a", "prod", Canary(version=2, percent=0, shadow=100, gates=gates))
    place = {"adapter": "a", "alias": "prod", "version": "2"}
    await eventually(lambda: sample(edge, "lorary_canary_percent", **place, how="copies") == 100)
    assert (await ask(edge, tokens=3)).version == 1
    scored = await edge.inference.Classify(
        pb.ClassifyRequest(adapter="a@prod", input=pb.Input(prompt="2 5"), labels=["8", "6"])
    )
    assert (scored.receipt.version, scored.receipt.canary) == (1, False)
    await eventually(lambda: sample(edge, "lorary_shadow_calls_total", result="same") == 2)
    copy = next(r for r in edge.engine.submitted if r.request_id.endswith("/copy"))
    original = next(r for r in edge.engine.submitted if f"{r.request_id}/copy" == copy.request_id)
    assert copy.priority == -10
    assert copy.sampling.seed == original.sampling.seed is not None, "both draw alike"
    assert copy.lease.digest == registry.resolve("a@2").digest

    edge.residency.poisoned[2] = CorruptArtifact("garbage")
    assert (await ask(edge)).version == 1, "a copy that fails is nobody's error"
    await eventually(lambda: registry.rollouts.of("a", "prod") is None)
    assert "33.3% of 3 calls failed" in registry.log("a")[-1].reason
    await eventually(lambda: edge.residency.num_held == 0)
