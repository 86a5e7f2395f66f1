"""The engine in a process of its own: the same answers, and what becomes of calls when either process dies."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorary import errors
from lorary.client import AdapterEvent, AsyncClient, Chunk, Client, GenerateResult, Snapshot
from lorary.errors import EngineFailed, InvalidRequest, LoraryError, Unavailable
from lorary.registry import BaseCard, Registry, Resolved
from lorary.server.adapters.residency import BaseLease
from lorary.server.apart import child, nouns, process
from lorary.server.apart.channel import Channel
from lorary.server.apart.process import EngineProcess, settings
from lorary.server.build import build_backend
from lorary.server.config import ServerConfig
from lorary.server.engine.request import (
    Constraint,
    Finish,
    Output,
    Pooling,
    PositionLogprobs,
    Request,
    Sampling,
)
from lorary.server.metrics import ServerMetrics
from tests.conftest import peft_greedy, wait_until
from tests.processes import ServerProcess, metric, started
from tests.server.conftest import registry_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

APART = ("--engine-process",)
# Bits that do not depend on who else is in a step, or was before.
SAME_BITS = ("--draft-rows", "0", "--no-prefix-cache", "--threads", "1")
IDS = [5, 9, 12, 30]


@pytest.fixture(scope="module")
def registry(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A registry with three adapters ``@prod``, and ``broken``, one of whose files is not what was pushed."""
    adapters = {name: tiny_adapters[name] for name in ("alpha", "bravo", "delta")}
    root = tmp_path_factory.mktemp("registry")
    opened = registry_of(root, tiny_base, adapters, aliases=["prod"])
    opened.push(tiny_adapters["charlie"], "broken", base=BaseCard.from_folder(tiny_base))
    folder = opened.fetch(opened.resolve("broken"))
    tensors = folder / "adapter_model.safetensors"
    tensors.chmod(0o600)
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"oops")
    return root / "store"


@pytest.fixture(scope="module")
def servers(
    tiny_base: Path, registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers of the same things: one in one process, one in two."""
    # How many steps' tokens share a frame is chance, and of no interest here.
    options = (*SAME_BITS, "--merge-memory", "64MiB", "--stream-frames", "0")
    together, apart = (tmp_path_factory.mktemp(name) for name in ("together", "apart"))
    with (
        started(tiny_base, registry, together, *options) as one,
        started(tiny_base, registry, apart, *options, *APART) as two,
    ):
        assert one.engine_pid == one.process.pid
        assert two.engine_pid != two.process.pid
        yield one, two


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def from_both(servers: tuple[ServerProcess, ServerProcess], ask: Callable[[Client], T]) -> list[T]:
    """Return what the two servers say."""
    said = []
    for server in servers:
        with Client(server.address) as client:
            said.append(ask(client))
    return said


def without_times(value: Any) -> Any:
    """Return a result as a mapping, less what differs from run to run."""
    told = dataclasses.asdict(value)
    told["receipt"] = {**told["receipt"], "timings": None, "request_id": None}
    return told


def failure(call: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Return what a call is refused with, less how long ago it was found out."""
    with pytest.raises(LoraryError) as caught:
        call(*args, **kwargs)
    error = caught.value
    return type(error), re.sub(r"[\d.]+ s\b", "… s", str(error)), getattr(error, "field", None)


def answers(client: Client) -> dict[str, Any]:
    """Ask for everything that a server can answer; return it by what was asked."""
    sampled: Any = {"temperature": 1.3, "seed": 11, "top_p": 0.9, "repetition_penalty": 1.1}
    kept: Any = {"max_tokens": 12, "ignore_eos": True}
    ask = client.generate
    found = {
        "base": ask(token_ids=IDS, **kept),
        "adapter": ask(token_ids=IDS, adapter="alpha@prod", **kept),
        "sampled": ask(token_ids=IDS, adapter="bravo", logprobs=3, **sampled, **kept),
        "prompt": ask(prompt="the cat", prompt_logprobs=2, max_tokens=3),
        "biased": ask(token_ids=IDS, logit_bias={7: 100.0}, max_tokens=3),
        "stopped": ask(token_ids=IDS, stop=["a", "e"], stop_token_ids=[3], max_tokens=40),
        "choice": ask(token_ids=IDS, adapter="alpha", choice=["the cat", "a dog"], max_tokens=9),
        "scaled": ask(token_ids=IDS, adapter="alpha", scale=0.5, **kept),
        "sum": ask(token_ids=IDS, adapters=[("alpha", 0.7), ("bravo@prod", -0.2)], **kept),
        "merged": ask(token_ids=IDS, adapter="delta", execution="merged", **kept),
    }
    told = {name: without_times(answer) for name, answer in found.items()}
    assert told["merged"]["receipt"]["is_merged"]
    many = client.generate_many(3, token_ids=IDS, adapter="alpha", **sampled, **kept)
    told["many"] = [without_times(answer) for answer in many]
    told["labels"] = without_times(
        client.classify(token_ids=IDS, adapter="bravo", labels=["good", "bad"])
    )
    told["scored"] = without_times(client.score([" cat", " dog mat"], prompt="the", with_end=True))
    vectors = client.embed(prompts=["the cat", "a dog"], adapter="alpha", dimensions=8)
    told["vectors"] = [without_times(vector) for vector in vectors]
    told["tokens"] = dataclasses.asdict(client.tokenize(prompt="the cat sat"))
    pieces = list(client.stream(token_ids=IDS, adapter="alpha", **kept))
    told["stream"] = [p.token_ids for p in pieces if isinstance(p, Chunk)]
    told["unknown"] = failure(ask, token_ids=IDS, adapter="nobody")
    told["too long"] = failure(ask, token_ids=[5] * 600)
    told["not a grammar"] = failure(ask, token_ids=IDS, lark="start: missing")
    told["damaged"] = failure(ask, token_ids=IDS, adapter="broken")
    told["damaged again"] = failure(ask, token_ids=IDS, adapter="broken")
    told["damaged part"] = failure(ask, token_ids=IDS, adapters=[("alpha", 1), ("broken", 1)])
    return told


def test_the_same_answers_token_by_token(
    servers: tuple[ServerProcess, ServerProcess],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
) -> None:
    one, two = from_both(servers, answers)
    for asked, answer in one.items():
        assert two[asked] == answer, asked
    wanted = peft_greedy(tiny_base, tiny_adapters["alpha"], IDS, 12)
    assert list(two["adapter"]["token_ids"])[: len(wanted)] == wanted


def state_of(client: Client) -> list[tuple[Any, ...]]:
    return [
        (a.name, a.residency, a.pinned, a.rank, a.device_bytes, a.num_pages, a.verified)
        for a in client.list_adapters()
    ]


def orders(client: Client) -> list[Any]:
    """Load, pin and unload; return what was said, and what was so, each time."""
    said: list[Any] = []
    with_events = client.watch(timeout_s=60)
    assert isinstance(next(with_events), Snapshot)
    refs = ("alpha", "bravo")
    for ref in refs:
        client.unload_adapter(ref)
    wait_until(lambda: {client.get_adapter(ref).residency for ref in refs} == {"registry"})
    said.append(client.load_adapter("alpha", pin=True).pinned)
    said.append(client.prefetch_adapter("bravo", wait=True).residency)
    # Their probes are looked for when calls may be answered already.
    wait_until(lambda: {a[6] for a in state_of(client) if a[1] == "resident"} == {"no probes"})
    said.append(state_of(client))
    said.append(client.unpin_adapter("alpha").pinned)
    said.append(failure(client.load_adapter, "broken"))
    said.append(failure(client.pin_adapter, "delta@5"))
    said.append(client.unload_adapter("alpha").residency)
    said.append(failure(client.pin_adapter, "alpha"))
    info = client.server_info()
    said.append((info.base, info.max_context, info.adapter_memory_used_bytes, info.num_running))
    kinds: list[str] = []
    for event in with_events:
        if isinstance(event, AdapterEvent) and event.name == "alpha":
            kinds.append(event.kind)
        if kinds[-2:] == ["unpinned", "evicted"]:
            break
    said.append(kinds[kinds.index("loading") :])
    return said


def test_the_same_control_of_what_is_on_the_device(
    servers: tuple[ServerProcess, ServerProcess],
) -> None:
    one, two = from_both(servers, orders)
    assert two == one
    assert two[-1] == ["loading", "resident", "pinned", "unpinned", "evicted"]


def test_both_processes_are_measured(servers: tuple[ServerProcess, ServerProcess]) -> None:
    with Client(servers[1].address) as client:
        client.generate(token_ids=IDS, adapter="alpha", max_tokens=4, ignore_eos=True)
    url = servers[1].metrics_url
    # What the engine's process counts is told beside the answers.
    wait_until(lambda: metric(url, "lorary_step_seconds_count") > 0)
    wait_until(lambda: metric(url, "lorary_adapter_loads_total", result="ok") > 0)
    wait_until(lambda: metric(url, "lorary_adapters", state="resident") > 0)
    wait_until(lambda: metric(url, "lorary_engine_process_resident_memory_bytes") > 2**20)
    assert metric(url, "lorary_engine_up") == 1


async def test_a_cancelled_answer_is_gone_within_a_step(
    servers: tuple[ServerProcess, ServerProcess],
) -> None:
    async with AsyncClient(servers[1].address) as client:
        async for _ in client.stream(token_ids=[5], max_tokens=200, ignore_eos=True):
            break
        for _ in range(3000):
            if not (await client.server_info()).num_running:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("it still runs")
        # It had 199 tokens to go.
        assert metric(servers[1].metrics_url, "lorary_tokens_total", kind="generation") > 0


def test_an_engine_that_dies_is_told_to_callers_watchers_and_the_supervisor(
    tiny_base: Path, registry: Path, tmp_path: Path
) -> None:
    async def streams(server: ServerProcess) -> list[Any]:
        async with (
            AsyncClient(server.address) as client,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            stub: Any = health_pb2_grpc.HealthStub(channel)
            health = stub.Watch(health_pb2.HealthCheckRequest(service="lorary.v1.Inference"))
            seen = [(await health.read()).status]
            begun: set[str] = set()
            all_begun = asyncio.Event()

            async def one(adapter: str) -> str:
                options: Any = {"max_tokens": 240, "ignore_eos": True}
                try:
                    # A tiny answer may be over before the last one has begun: then another is asked for.
                    while not all_begun.is_set():
                        async for _ in client.stream(token_ids=IDS, adapter=adapter, **options):
                            begun.add(adapter)
                            if len(begun) == 3:
                                all_begun.set()
                        begun.discard(adapter)
                except LoraryError as error:
                    return type(error).__name__
                return "whole"

            asked = [asyncio.create_task(one(adapter)) for adapter in ("", "alpha", "bravo")]
            await all_begun.wait()
            os.kill(server.engine_pid, signal.SIGKILL)
            ends = await asyncio.gather(*asked)
            seen.append((await health.read()).status)
            return [ends, seen]

    # Nor is it sure that none is here, to its end, before the engine is dead.
    for number in range(5):
        (work := tmp_path / str(number)).mkdir()
        with started(tiny_base, registry, work, *SAME_BITS, *APART) as server:
            ends, seen = asyncio.run(streams(server))
            kind = health_pb2.HealthCheckResponse
            assert seen == [kind.SERVING, kind.NOT_SERVING]
            assert server.process.wait(60) == 70
            assert "the engine's process was ended by SIGKILL" in server.log.read_text()
        if "whole" not in ends:
            break
    assert ends == ["EngineFailed"] * 3


def test_what_cannot_start_says_so_as_it_always_did(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    Registry.open(folder, create=True)
    said = []
    for apart in (False, True):
        config = ServerConfig(base="nosuchbase", registry=str(folder), engine_process=apart)
        with pytest.raises(LoraryError) as caught:
            build_backend(config, deliver=lambda _: None, observer=ServerMetrics())
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def test_a_process_that_ends_before_it_is_ready_is_no_riddle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "MODULE", "lorary.nowhere")
    engine = EngineProcess(ServerConfig(base="x"), deliver=lambda _: None, observer=ServerMetrics())
    with pytest.raises(EngineFailed, match="exit code 1 while it started"):
        engine.wait_ready()
    engine.kill()


def test_a_drain_ends_no_stream_early_and_leaves_no_process(
    servers: tuple[ServerProcess, ServerProcess],
) -> None:
    """The last test of these servers."""
    apart = servers[1]

    async def streams() -> list[GenerateResult]:
        async with AsyncClient(apart.address) as client:
            begun: set[int] = set()
            all_begun = asyncio.Event()

            async def one(number: int) -> GenerateResult:
                options: Any = {"max_tokens": 200, "ignore_eos": True}
                adapter = ("", "alpha", "bravo")[number % 3]
                events = []
                async for event in client.stream(token_ids=IDS, adapter=adapter, **options):
                    events.append(event)
                    begun.add(number)
                    if len(begun) == 9:
                        all_begun.set()
                assert isinstance(events[-1], GenerateResult)
                return events[-1]

            asked = [asyncio.create_task(one(number)) for number in range(9)]
            await all_begun.wait()
            apart.process.terminate()
            os.kill(apart.engine_pid, signal.SIGTERM)  # as some supervisors do
            return await asyncio.gather(*asked)

    for answer in asyncio.run(streams()):
        assert len(answer.token_ids) == 200
    assert apart.process.wait(60) == 0
    assert not lives(apart.engine_pid)


ORPHAN = """
import ctypes, sys
from lorary.server.apart.child import die_with
die_with(int(sys.argv[1]))
print("on", flush=True)
ctypes.PyDLL(None).sleep(60)  # holds the interpreter, as a kernel might
"""
DOOR = """
import os, subprocess, sys, time
life, held = os.pipe()
orphan = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], str(life)], pass_fds=[life], stdout=subprocess.PIPE
)
orphan.stdout.readline()
print(orphan.pid, flush=True)
time.sleep(60)
"""


def test_an_engine_that_holds_its_interpreter_does_not_outlive_its_door() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DOOR, ORPHAN], stdout=subprocess.PIPE, text=True
    ) as door:
        assert door.stdout is not None
        orphan = int(door.stdout.readline())
        assert lives(orphan)
        door.kill()
    wait_until(lambda: not lives(orphan))


# -- what travels ---------------------------------------------------------------------------------


def carried(*message: Any) -> list[Any]:
    """Return a message as the other end of a channel receives it."""
    ours, theirs = socket.socketpair()
    sender, receiver = Channel(ours), Channel(theirs)
    sender.send(*message)
    sender.close()
    (received,) = receiver.receive()
    receiver.close()
    return received


def defaults_of(noun: Any) -> set[str]:
    """Return the fields that have their default."""
    return {f.name for f in dataclasses.fields(noun) if getattr(noun, f.name) == f.default}


def test_a_request_travels_whole() -> None:
    sampling = Sampling(
        max_tokens=7, temperature=0.1, stop=("\n", "\u2028é\ud800"), stop_token_ids=(1, 2),
        seed=2**63 - 1, logprobs=0, constraint=Constraint("choice", '["a"]'), logit_bias=((3, -1.5),),
    )  # fmt: skip
    request = Request(
        request_id="r/1", prompt_ids=[1, 2, 3], sampling=sampling, lease=BaseLease(), index=2,
        labels=((4, 5), (6,)), priority=-3, account="sha256:a", keep_prefix=False, arrived_s=0.1 + 0.2,
        deadline_s=1.5, salt="acme", active_from=2, pooling=Pooling(kind="mean", dimensions=8),
    )  # fmt: skip
    versions = Resolved(name="a", version=1, digest="sha256:a", alias="prod", deprecated="")
    wanted = nouns.Wanted(digest="mix:x", parts=((versions, 0.5),), execution="auto")
    what, row, held = carried("submit", request, wanted)
    assert what == "submit"
    assert nouns.request(row, request.lease) == request
    # A field that is new and not in here is not known to travel.
    assert defaults_of(request) == {"grammar", "execution", "is_on_merged"}
    assert nouns.wanted(held) == wanted
    assert wanted.resolved is None
    assert dataclasses.replace(wanted, digest="sha256:a").resolved == versions


def test_outputs_travel_whole() -> None:
    position = PositionLogprobs(chosen=(3, -0.25), top=((3, -0.25), (4, float("-inf"))))
    finish = Finish(
        reason="stop", text="x\ny", matched_stop="\n", prompt_tokens=3, completion_tokens=2,
        cached_tokens=1, queue_ns=10**12, adapter_load_ns=0, prefill_ns=5, decode_ns=6,
        label_token_logprobs=((-1.0, -2.0), (-3.5,)), prompt_logprobs=(position,), is_merged=True,
        embedding=(0.1, -2.5), cached_base_tokens=1, cached_below_tokens=2,
    )  # fmt: skip
    outputs = [
        Output(request_id="a/1", index=0, text=" the", token_ids=[7], logprobs=(position,)),
        Output(request_id="a/1", index=1, finish=finish),
        Output(request_id="b/2", index=0, error=Unavailable("later", retry_after_s=2.5)),
    ]
    assert not defaults_of(finish)
    _, rows = carried("outputs", outputs)
    arrived = [nouns.output(row) for row in rows]
    assert arrived[:2] == outputs[:2]
    assert isinstance(arrived[2].error, Unavailable)
    assert arrived[2].error.retry_after_s == 2.5


def test_every_error_travels_as_what_it_is() -> None:
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, LoraryError)
    ]
    for cls in classes:
        _, row = carried("failed", cls("what; why"))
        arrived = nouns.error(row)
        assert type(arrived) is cls
        assert str(arrived) == "what; why"
    _, row = carried("failed", InvalidRequest("no", field="input.text"))
    arrived = nouns.error(row)
    assert isinstance(arrived, InvalidRequest)
    assert arrived.field == "input.text"


def test_the_other_process_reads_the_same_configuration(tmp_path: Path) -> None:
    config = ServerConfig(base="x", access=tmp_path / "a.yaml", engine_process=True, http_port=0)
    read = child.read_config(json.loads(json.dumps(settings(config))))
    assert read == dataclasses.replace(config, engine_process=False)
