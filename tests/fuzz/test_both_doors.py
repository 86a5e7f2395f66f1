"""Thousands of calls that nobody would make, through both doors of a real server: it must not notice.

Each must end as the docs say that it may; afterwards the server is as it was before. A few hundred here; as many
as ``LORARY_FUZZ_INPUTS`` says, drawn from ``LORARY_FUZZ_SEED``, in ``make verify-service``.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from lorary.client import Client
from lorary.oip import open_inference_pb2_grpc
from lorary.registry import BaseCard, Registry
from lorary.v1 import control_pb2_grpc, inference_pb2_grpc
from tests.conftest import AdapterRecipe, build_adapter, build_llama, write_manifest
from tests.fuzz.driver import Driver
from tests.fuzz.grpc_door import METHODS, grpc_inputs
from tests.fuzz.holdings import SETTLED_S, grown, holdings, resident_mb
from tests.fuzz.http_door import http_inputs, socket_inputs
from tests.processes import metric, serving
from tests.tool_templates import tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuzz.grpc_door import GrpcInput
    from tests.fuzz.http_door import HttpInput
    from tests.processes import ServerProcess

INPUTS = int(os.environ.get("LORARY_FUZZ_INPUTS", "400"))
SEED = int(os.environ.get("LORARY_FUZZ_SEED", "1"))
ROUNDS = 4
"""The first fills what is bounded: pools of threads, caches. From then on nothing may grow."""
MAX_BATCH, CONTEXT = 8, 256
JUDGE = {
    "kind": "classification",
    "template": "<|im_start|>user\n{{ text }}<|im_end|>\n<|im_start|>assistant\n",
    "labels": ("bad", "good", "not good"),
}
PROMPT = [5, 9, 12, 30]
OPTIONS: Any = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[ServerProcess]:
    """A base that writes any text and knows tools, two adapters, every feature that has a switch."""
    base = build_llama(log / "base", tokenizer=tokenizer_of("hermes", marks="special"))
    registry = Registry.open(log / "registry", create=True)
    for name, recipe, task in (
        ("alpha", AdapterRecipe(rank=4, seed=1), {}),
        ("judge", AdapterRecipe(rank=8, seed=2, strength=0.2), JUDGE),
    ):
        folder = write_manifest(base, build_adapter(base, log / name, recipe), **task)
        registry.push(folder, name, base=BaseCard.from_folder(base))
        registry.set_alias(name, "prod", 1)
    options = (
        "--http-port",
        "0",
        "--open-inference",
        "--merge-memory",
        "16MiB",
        "--max-batch",
        str(MAX_BATCH),
    )
    with serving(base, log / "registry", log, *options, "--max-waiting", "64") as running:
        yield running


@pytest.mark.timeout(3600)
def test_whatever_is_sent_the_server_stays_as_it_was(
    server: ServerProcess, log: Path, record_property: Callable[[str, object], None]
) -> None:
    known = answers(server)
    memory = []
    with Driver(server) as driver:
        for number in range(ROUNDS):
            fuzz(driver, INPUTS // ROUNDS, SEED * 1000 + number)
            driver.drain()
            free(server)
            if number == 0:
                fill_pools(server)
                before = holdings(server)
            memory.append(resident_mb(server))
    for door, count in sorted(driver.sent.items()):
        record_property(f"inputs through {door}", count)
    logged = (log / "server.log").read_text(errors="replace")
    traces = re.findall(r"Traceback \(most recent call last\)|never retrieved", logged)
    record_property("faults", len(driver.faults) + len(traces))
    assert not driver.faults, "\n".join(driver.faults)
    assert not traces, logged[logged.index(traces[0]) :][:5000]
    assert answers(server) == known
    free(server)
    assert grown(before, server) == {}
    whole_house(server)
    record_property("megabytes more", f"{memory[-1] - memory[0]:.1f}")
    record_property("megabytes", " ".join(f"{mb:.0f}" for mb in memory))


@pytest.mark.timeout(3600)
def test_what_its_description_allows_is_answered_as_described(
    server: ServerProcess, record_property: Callable[[str, object], None]
) -> None:
    """By /openapi.json: bodies that it allows, and bodies that it forbids, which are all refused."""
    described = schemathesis.openapi.from_url(f"{server.http_url}/openapi.json")
    found: Any = described.get_all_operations()
    operations = [one.ok() for one in found]
    posts = [operation for operation in operations if operation.method == "post"]
    counts: Counter[str] = Counter()
    kinds = [(one, GenerationMode.POSITIVE) for one in operations]
    kinds += [(one, GenerationMode.NEGATIVE) for one in posts]
    for number, (operation, mode) in enumerate(kinds):
        # Paths without a body have few requests.
        share = INPUTS // 10 // len(posts) if operation in posts else 8

        @seed(SEED * 1000 + number)
        @settings(max_examples=share, phases=[Phase.generate], **OPTIONS)
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case[Any]) -> None:
            counts[case.method] += 1
            case.validate_response(case.call(timeout=120), CHECKS)

        ask()
    record_property("inputs through OpenAPI", counts.total())


def fuzz(driver: Driver, count: int, drawn_from: int) -> None:
    """Send ``count`` inputs of all kinds."""

    @seed(drawn_from)
    @settings(max_examples=count, phases=[Phase.generate], **OPTIONS)
    @given(
        (grpc_inputs() | grpc_inputs() | http_inputs() | http_inputs() | socket_inputs())
        | (grpc_inputs("OIP gRPC") | http_inputs("OIP HTTP"))
    )
    def send(one: GrpcInput | HttpInput) -> None:
        driver.send(one)

    send()


def answers(server: ServerProcess) -> list[Any]:
    """Return what known calls are answered: tokens, scores and text, through either door."""
    with Client(server.address, timeout_s=120) as client:
        said: list[Any] = [
            list(client.generate(token_ids=PROMPT, adapter=name, max_tokens=24).token_ids)
            for name in ("", "alpha@1", "judge@1")
        ]
        said.append(client.classify("the film was good", adapter="judge@1").label)
    body = {
        "model": "judge@1",
        "messages": [{"role": "user", "content": "the cat"}],
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{server.http_url}/v1/chat/completions",
        json.dumps(body | {"max_tokens": 24}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        said.append(json.load(answer)["choices"])
    return said


def free(server: ServerProcess) -> None:
    """Let go of every adapter: what nobody holds leaves the device."""
    with Client(server.address, timeout_s=120) as client:
        for name in ("alpha@1", "judge@1"):
            client.unload_adapter(name)
        ends = time.monotonic() + SETTLED_S
        while any(adapter.num_running for adapter in client.list_adapters()):
            assert time.monotonic() < ends, "an adapter is held, and nobody calls"
            time.sleep(0.05)


def fill_pools(server: ServerProcess) -> None:
    """Let every pool have all its threads, so that none is new later."""

    def scrape(_: int) -> None:
        with urllib.request.urlopen(f"{server.http_url}/metrics") as answer:
            answer.read()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(scrape, range(128)))


def whole_house(server: ServerProcess) -> None:
    """As many of the longest answers as there is room for, and both adapters: nothing of it is lost."""
    preempted = metric(server.metrics_url, "lorary_preemptions_total")
    with Client(server.address, timeout_s=120) as client, ThreadPoolExecutor(MAX_BATCH) as pool:

        def longest(number: int) -> int:
            answer = client.generate(
                token_ids=[number + 10],
                adapter=("alpha", "judge")[number % 2],
                max_tokens=CONTEXT - 1,
                ignore_eos=True,
            )
            return len(answer.token_ids)

        assert list(pool.map(longest, range(MAX_BATCH))) == [CONTEXT - 1] * MAX_BATCH
    assert metric(server.metrics_url, "lorary_preemptions_total") == preempted


def test_every_method_is_among_what_is_sent() -> None:
    """By their descriptors, so that a new one is fuzzed from its first day."""
    paths = {method.path for method in METHODS}
    services = (
        inference_pb2_grpc.InferenceServicer,
        control_pb2_grpc.ControlServicer,
        open_inference_pb2_grpc.GRPCInferenceServiceServicer,
    )
    names = {name for service in services for name in vars(service) if name[0].isupper()}
    assert names <= {path.rpartition("/")[2] for path in paths}
