"""Two replicas on Ray Serve beside one plain server: the same answers, the same errors, adapters at home."""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.harness.ray_cluster import RayProcess
from lorary.registry import BaseCard, Registry
from lorary.server.status import DETAILS_KEY
from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc
from tests.conftest import RECIPES, build_adapter, build_llama, write_manifest
from tests.deploy.test_live_scrape import free_port
from tests.processes import serving

if TYPE_CHECKING:
    from collections.abc import Iterator

ADAPTERS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot")
WHOLE, ENDLESS = 400, 8000
"""Tokens of an answer that a test waits for, and of one that is not over when the test ends it: the tiny base
makes a thousand a second."""
CONTEXT = 8192
OPTIONS = {"device": "cpu", "dtype": "float32", "max_context": CONTEXT, "draft_rows": 0}


@dataclass(frozen=True)
class Answer:
    """What a call brought, and what stood in its trailing metadata."""

    token_ids: tuple[int, ...]
    facts: dict[str, Any]


class Caller:
    """gRPC as any language has it: no client of ours, no metadata of its own."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        stub: Any = inference_pb2_grpc.InferenceStub
        self.inference = stub(self.channel)

    def generate(self, adapter: str, *, max_tokens: int = 8, **how: Any) -> Answer:
        call = self.start(adapter, max_tokens=max_tokens, **how)
        return self.finish(call)

    def start(self, adapter: str, *, max_tokens: int, timeout_s: float = 30.0) -> Any:
        request = pb.GenerateRequest(
            adapter=adapter,
            input=pb.Input(prompt="the cat sat on"),
            sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        return self.inference.Generate(request, timeout=timeout_s)

    def finish(self, call: Any) -> Answer:
        ids = [token for event in call for token in event.chunk.token_ids]
        return Answer(tuple(ids), dict(call.trailing_metadata()))

    def refused(self, request: Any) -> tuple[grpc.StatusCode, str, status_pb2.Status, str]:
        with pytest.raises(grpc.RpcError) as caught:
            list(self.inference.Generate(request, timeout=30))
        error: Any = caught.value
        facts = dict(error.trailing_metadata())
        status = status_pb2.Status.FromString(facts[DETAILS_KEY])
        return error.code(), error.details(), status, facts["lorary-request-id"]

    def steps(self) -> dict[str, int]:
        """Steps made so far by each replica; as many as two are found."""
        found: dict[str, int] = {}
        until = time.monotonic() + 20
        while len(found) < 2 and time.monotonic() < until:
            answer, call = self.inference.GetServerInfo.with_call(
                pb.GetServerInfoRequest(), timeout=30
            )
            tag = dict(call.trailing_metadata())["lorary-replica"]
            found[tag] = sum(answer.steps_by_distinct_adapters)
        return found

    def settled(self) -> int:
        """Wait until both replicas have stopped; return the steps that they have made."""
        until = time.monotonic() + 120
        last: dict[str, int] = {}
        while (found := self.steps()) != last or len(found) < 2:
            assert time.monotonic() < until, f"it never stopped: {found}"
            last = found
            time.sleep(0.5)
        return sum(found.values())


@dataclass
class Cluster:
    """Ray Serve with two replicas, and a plain server with the same registry."""

    ray: Caller
    plain: Caller
    process: RayProcess


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if importlib.util.find_spec("ray") is None:
        reason = (
            "NO RAY: nothing was run on Ray Serve, and nothing is known of deploy/ray. "
            "Install it: pip install 'lorary[ray]'"
        )
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    root = tmp_path_factory.mktemp("ray")
    registry = Registry.open(root / "registry", create=True)
    base = build_llama(root / "base", max_position_embeddings=CONTEXT)
    card = BaseCard.from_folder(base)
    for name in ADAPTERS:
        folder = write_manifest(base, build_adapter(base, root / name, RECIPES[name]))
        registry.push(folder, name, base=card)
    port, http_port, log = free_port(), free_port(), root / "ray.log"
    args = {"base": str(base), "registry": str(root / "registry"), **OPTIONS}
    # Fewer than there are, so that Serve forgets adapters all the time.
    args["adapters_per_replica"] = 3
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    with serving(base, root / "registry", root, *flags) as plain:
        process = RayProcess(args, port=port, http_port=http_port, log=log)
        try:
            yield Cluster(Caller(f"127.0.0.1:{port}"), Caller(plain.address), process)
        finally:
            status = process.stop()
    assert status == 0, log.read_text()[-4000:]


def test_answers_are_those_of_a_plain_server(cluster: Cluster) -> None:
    for adapter in ("alpha", "bravo", "bravo@1", ""):
        answer, wanted = cluster.ray.generate(adapter), cluster.plain.generate(adapter)
        assert answer.token_ids == wanted.token_ids
        for fact in ("lorary-adapter", "lorary-adapter-version", "lorary-adapter-digest"):
            assert answer.facts.get(fact) == wanted.facts.get(fact)


def test_an_adapter_has_a_home(cluster: Cluster) -> None:
    # Those that nobody has called yet: calls that come together while an adapter is cold may make two homes.
    homes: dict[str, set[str]] = {}
    for adapter in ADAPTERS[2:]:
        cluster.ray.generate(adapter)
        time.sleep(1)  # Serve tells its proxies ten times a second
        homes[adapter] = {
            cluster.ray.generate(f"{adapter}{ending}").facts["lorary-replica"]
            for ending in ("", "@1", "@latest")
            for _ in range(4)
        }
    assert {len(found) for found in homes.values()} == {1}, homes
    assert len(set.union(*homes.values())) == 2, homes


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(adapter="nobody", input=pb.Input(prompt="the cat")),
        pb.GenerateRequest(adapter="../x", input=pb.Input(prompt="the cat")),
        pb.GenerateRequest(
            input=pb.Input(prompt="the cat"), sampling=pb.SamplingParams(temperature=-1)
        ),
    ],
    ids=["not-found", "bad-ref", "bad-field"],
)
def test_refusals_are_those_of_a_plain_server(cluster: Cluster, request_: Any) -> None:
    request_.request_id = "mine"
    refused, wanted = cluster.ray.refused(request_), cluster.plain.refused(request_)
    assert refused == wanted
    assert len(refused[2].details) >= 2  # ErrorInfo, and what it is about


def test_a_running_answer_keeps_its_adapter_while_serve_forgets_it(cluster: Cluster) -> None:
    wanted = cluster.plain.generate("alpha", max_tokens=WHOLE)
    running_call = cluster.ray.start("alpha", max_tokens=WHOLE)
    for _ in range(3):
        for adapter in ADAPTERS[1:]:
            cluster.ray.generate(adapter, max_tokens=2)
    assert cluster.ray.finish(running_call).token_ids == wanted.token_ids


def test_a_cancelled_stream_frees_its_row(cluster: Cluster) -> None:
    # Where this process stood still an answer may be over before it is cancelled: then another one is.
    for _ in range(5):
        before = cluster.ray.settled()
        call = cluster.ray.start("alpha", max_tokens=ENDLESS)
        next(iter(call))
        call.cancel()
        if cluster.ray.settled() - before < ENDLESS / 2:
            break
    else:
        pytest.fail("cancelled streams went on")


def test_the_deadline_is_the_engines_too(cluster: Cluster) -> None:
    before = cluster.ray.settled()
    with pytest.raises(grpc.RpcError) as caught:
        cluster.ray.generate("alpha", max_tokens=ENDLESS, timeout_s=0.1)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert cluster.ray.settled() - before < ENDLESS / 2


def test_load_balancers_may_ask_for_health(cluster: Cluster) -> None:
    stub = health_pb2_grpc.HealthStub(cluster.ray.channel)
    for service in ("", "lorary.v1.Inference"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=60)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.NOT_FOUND


def test_a_killed_replica_is_replaced(cluster: Cluster) -> None:
    """Last in this file: it leaves another cluster than it found."""
    before = set(cluster.ray.steps())
    gone = cluster.ray.generate("bravo").facts["lorary-replica"]
    call = cluster.ray.start("bravo", max_tokens=ENDLESS)
    next(iter(call))
    cluster.process.kill(gone)
    with pytest.raises(grpc.RpcError) as caught:
        cluster.ray.finish(call)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "ip=" not in error.details()
    assert "pid=" not in error.details()
    wanted = cluster.plain.generate("bravo").token_ids
    until = time.monotonic() + 120
    found: set[str] = set()
    while len(found - before) < 1 and time.monotonic() < until:
        answer = cluster.ray.generate("bravo")
        assert answer.token_ids == wanted
        found |= set(cluster.ray.steps())
        time.sleep(0.2)
    assert found - before, "no new replica"
    assert gone not in cluster.ray.steps()
