"""Calls that go by their adapter, over several servers, with nothing between."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lorary.affinity import HEADER, affinity_key
from lorary.client import AsyncClient, Client
from lorary.errors import ConfigError
from lorary.v1 import control_pb2, inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_SERVERS = 4
ADAPTERS = [f"team/adapter-{number}" for number in range(24)]


class Backend(inference_pb2_grpc.InferenceServicer):
    """Says in its answers which server it is, and remembers what it was told."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        register: Any = inference_pb2_grpc.add_InferenceServicer_to_server
        register(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Tokenize(self, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        return inference_pb2.TokenizeResponse(token_ids=[self.port], pieces=["x"])

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def backends() -> Iterator[list[Backend]]:
    with ExitStack() as stack:
        found = [Backend() for _ in range(NUM_SERVERS)]
        for backend in found:
            stack.callback(backend.stop)
        yield found


def target_of(backends: list[Backend]) -> str:
    return "ipv4:" + ",".join(f"127.0.0.1:{backend.port}" for backend in backends)


def homes(client: Client, adapter: str, calls: int = 1) -> set[int]:
    return {client.tokenize(prompt="x", adapter=adapter).token_ids[0] for _ in range(calls)}


def test_an_adapter_stays_on_its_server_while_another_one_dies(backends: list[Backend]) -> None:
    with Client(target_of(backends), affinity=1) as client:
        before = {adapter: homes(client, adapter, 3) for adapter in ADAPTERS}
        assert {len(found) for found in before.values()} == {1}
        assert set.union(*before.values()) == {backend.port for backend in backends}
        # Versions and aliases of one adapter belong together, wherever it stands among others.
        assert homes(client, f"{ADAPTERS[0]}@prod") == before[ADAPTERS[0]]
        backends[0].stop()
        after = {adapter: homes(client, adapter, 3) for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        assert len(after[adapter]) == 1
        if before[adapter] != {backends[0].port}:
            assert after[adapter] == before[adapter]


def test_a_hot_adapter_is_spread(backends: list[Backend]) -> None:
    with Client(target_of(backends), affinity=2) as client:
        found = [len(homes(client, adapter, 12)) for adapter in ADAPTERS]
    # Its two places on the ring may belong to one server.
    assert max(found) == 2
    assert min(found) >= 1
    keys = {one[HEADER] for backend in backends for one in backend.metadata}
    assert keys <= {f"{adapter}#{number}" for adapter in ADAPTERS for number in range(2)}


async def test_servers_take_turns_without_it(backends: list[Backend]) -> None:
    ports: set[int] = set()
    async with AsyncClient(target_of(backends)) as client, asyncio.timeout(30):
        # Whoever is connected to takes part; on a busy machine that is one server for a while.
        while len(ports) < 2:
            ports.update((await client.tokenize(prompt="x", adapter=ADAPTERS[0])).token_ids)
    assert all(HEADER not in one for backend in backends for one in backend.metadata)


async def test_the_base_goes_anywhere_and_tokens_go_along(backends: list[Backend]) -> None:
    from lorary.client.credentials import Credentials

    credentials = Credentials(token="lry_x", insecure=True)
    async with AsyncClient(target_of(backends), affinity=1, credentials=credentials) as client:
        for adapter in ("", ADAPTERS[0]):
            await client.tokenize(prompt="x", adapter=adapter)
    told = [one for backend in backends for one in backend.metadata]
    assert [one.get(HEADER) for one in told] in ([None, ADAPTERS[0]], [ADAPTERS[0], None])
    assert {one["authorization"] for one in told} == {"Bearer lry_x"}


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        (inference_pb2.GenerateRequest(adapter="team/a@prod"), "team/a"),
        (inference_pb2.GenerateRequest(adapter="a@sha256:00"), "a"),
        (
            inference_pb2.GenerateRequest(
                adapters=[
                    inference_pb2.WeightedAdapter(adapter="lead@2"),
                    inference_pb2.WeightedAdapter(adapter="b"),
                ]
            ),
            "lead",
        ),
        (inference_pb2.GenerateRequest(), None),
        (inference_pb2.GetServerInfoRequest(), None),
        (control_pb2.LoadAdapterRequest(adapter="a@3"), "a"),
        # What no header may hold is no adapter's name; the server says so.
        (inference_pb2.GenerateRequest(adapter="ä"), None),
        (inference_pb2.GenerateRequest(adapter="a\nb"), None),
        (inference_pb2.GenerateRequest(adapter="a" * 300), None),
        (inference_pb2.GenerateRequest(adapter="@prod"), None),
    ],
)
def test_the_key_is_the_name(request_: Any, key: str | None) -> None:
    assert affinity_key(request_) == key


def test_a_spread_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="affinity is 65"):
        Client("127.0.0.1:1", affinity=65)
