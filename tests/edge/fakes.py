"""An engine, a residency, a registry and prompts whose every answer can be worked out on paper.

Tokens are numbers below 1000, and the text of token 12 is ``"12 "``. The adapters are ``alpha``
(number 1) and ``beta`` (number 2); the bare base has number 0.

    next token = last token + number of the adapter + 1        (modulo 1000)

So from prompt ``[2, 5]``, adapter ``beta`` gives 8, 11, 14 and the bare base gives 6, 7, 8.
A label is a number, too; its log probability is minus its distance from the next token: from prompt
``[2, 5]``, ``beta`` scores label ``"8"`` with 0.0 and label ``"10"`` with -2.0.
The hidden state of token t is ``(t, number of the adapter + 3, 0, 4)``, before it is pooled.

Prompts: ``"2 5"`` is ``[2, 5]``; a task's template puts 100 in front, a chat 200, a chat with tools 300; so
``text="2 5"`` reads ``[100, 2, 5]``.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import grpc.aio

from lorary.errors import (
    AdapterNotFound,
    Cancelled,
    DeadlineExceeded,
    IncompatibleAdapter,
    InvalidRequest,
    LoraryError,
    Unavailable,
)
from lorary.registry import parse_ref
from lorary.registry.manifest import BaseIdentity, Method, Task
from lorary.server.adapters.composed import Compositions
from lorary.server.adapters.host_tier import HostStats
from lorary.server.answers import ServerFacts
from lorary.server.app import Server
from lorary.server.build import Backend
from lorary.server.calls import Calls
from lorary.server.config import ServerConfig
from lorary.server.core import Core
from lorary.server.engine.request import (
    Constraint,
    Finish,
    Output,
    PositionLogprobs,
    Request,
    StepStats,
)
from lorary.server.metrics import ServerMetrics
from lorary.server.validate import Limits
from lorary.v1 import control_pb2_grpc, inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from lorary.registry.aliases import AliasMove
    from lorary.server.adapters.probe_runs import Verdict
    from lorary.server.ports import Observer
    from lorary.server.tracing.calls import Tracing

VOCAB = 1000
CONTEXT = 64
HIDDEN = 4
FINGERPRINT = "sha256:" + "b" * 64
ADAPTERS = {"alpha": 1, "beta": 2, "other-base": 3}


@dataclass(frozen=True)
class FakeResolved:
    name: str
    version: int
    digest: str
    alias: str | None = None
    deprecated: str = ""


@dataclass(frozen=True)
class FakeManifest:
    base: BaseIdentity
    task: Task
    method: Method


@dataclass(frozen=True)
class FakeVersion:
    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    rank: int
    task_kind: str


def digest_of(name: str) -> str:
    return "sha256:" + f"{ADAPTERS[name]:x}" * 64


class FakeRollouts:
    """No alias has a canary."""

    def all(self, name: str) -> dict[str, Any]:
        return {}

    def of(self, name: str, alias: str) -> None:
        return None

    def stop(self, name: str, alias: str, *, expect: Any, reason: str, actor: str) -> None:
        raise AssertionError("there is no canary")

    promote = stop


class FakeRegistry:
    """One version of each adapter; ``alpha`` generates, ``beta`` classifies into 8 and 10."""

    def __init__(self) -> None:
        self.broken: BaseException | None = None
        self.listed: list[str] = []

    @property
    def rollouts(self) -> FakeRollouts:
        return FakeRollouts()

    def set_alias(
        self, name: str, alias: str, version: int | None, *, expect: Any, reason: str, actor: str
    ) -> None:
        raise AssertionError("the fakes' aliases do not move")

    def rollback(self, name: str, alias: str, *, expect: Any, reason: str, actor: str) -> None:
        raise AssertionError("the fakes' aliases do not move")

    def log(self, name: str) -> tuple[AliasMove, ...]:
        return ()

    def trouble(self) -> str:
        return str(self.broken or "")

    def resolve(self, ref: str) -> FakeResolved:
        if self.broken is not None:
            raise self.broken
        parsed = parse_ref(ref)
        if parsed.name not in ADAPTERS or parsed.version not in (None, 1):
            raise AdapterNotFound(f"adapter '{ref}' is not in the registry.")
        return FakeResolved(parsed.name, 1, digest_of(parsed.name), parsed.alias)

    def manifest(self, resolved: FakeResolved) -> FakeManifest:
        fingerprint = "sha256:" + "e" * 64 if resolved.name == "other-base" else FINGERPRINT
        task = (
            Task(kind="classification", template="100 {{ text }}", labels=("8", "10"))
            if resolved.name == "beta"
            else Task(template="100 {{ text }}", max_new_tokens=5, stop=("900",))
        )
        return FakeManifest(
            BaseIdentity(name="tiny", fingerprint=fingerprint, architecture="x"),
            task,
            Method(name="lora", rank=8, alpha=8.0, target_modules=("q_proj",)),
        )

    def list(self, name: str = "") -> list[FakeVersion]:
        self.listed.append(name)
        return [
            FakeVersion(
                one, 1, digest_of(one), ("prod",), 8, self.manifest(self.resolve(one)).task.kind
            )
            for one in ADAPTERS
            if name in ("", one)
        ]


class FakePrompts:
    """Numbers in a text are its tokens."""

    def from_prompt(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def from_task(self, task: Task, inputs: Mapping[str, str]) -> list[int]:
        return [100, *self.from_prompt(inputs["text"])]

    special_tokens = ("<|end|>",)

    def from_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        start = 300 if tools else 200
        return [start, *(int(w) for m in messages for w in m["content"].split())]

    def render_chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_answered: bool = False,
    ) -> str:
        calls = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
        written = [f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls]
        return "".join([*(tool["function"]["name"] for tool in tools), "\n", *written])

    def mark_id(self, text: str) -> int | None:
        return None

    eos_id = 7

    def label_ids(self, label: str, *, field: str = "labels") -> tuple[int, ...]:
        return (int(label),)


class FakeCompiler:
    """Every grammar but ``"("`` compiles; answers take no notice of it."""

    def submit(self, constraint: Constraint) -> Future[Any]:
        compiling: Future[Any] = Future()
        if constraint.text == "(":
            error = InvalidRequest("the constraint cannot be used.", field="sampling.regex")
            compiling.set_exception(error)
        else:
            compiling.set_result(object())
        return compiling


@dataclass
class FakeLease:
    residency: FakeResidency
    name: str
    digest: str
    is_ready: bool
    error: LoraryError | None = None
    is_released: bool = False
    entry: None = None

    def release(self) -> None:
        if not self.is_released:
            self.is_released = True
            self.residency.num_released += 1


@dataclass(frozen=True)
class FakeResident:
    name: str
    version: int
    digest: str
    state: str
    pinned: bool
    rank: int
    device_bytes: int
    num_holders: int
    num_pages: int = 1


@dataclass
class FakeResidency:
    """Adapters named in ``slow`` stay on their way until ``arrive`` or ``fail`` is called."""

    slow: set[str] = field(default_factory=set)
    leases: list[FakeLease] = field(default_factory=list)
    num_released: int = 0
    resident: dict[str, FakeResident] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    refused: dict[str, LoraryError] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)

    @property
    def num_held(self) -> int:
        return len(self.leases) - self.num_released

    def acquire(self, resolved: FakeResolved) -> FakeLease:
        if resolved.digest in self.refused:
            raise self.refused[resolved.digest]
        is_ready = resolved.name not in self.slow
        lease = FakeLease(self, resolved.name, resolved.digest, is_ready)
        self.leases.append(lease)
        if resolved.digest not in self.resident:
            state = "resident" if is_ready else "loading"
            self._put(resolved, state=state)
        return lease

    def prefetch(self, resolved: FakeResolved) -> None:
        self.acquire(resolved).release()

    def arrive(self, name: str) -> None:
        for lease in self.leases:
            lease.is_ready = lease.is_ready or lease.name == name

    def fail(self, name: str, error: LoraryError) -> None:
        for lease in self.leases:
            if lease.name == name:
                lease.error = error

    def check_fits(self, ranks: Mapping[str, int]) -> None:
        if sum(ranks.values()) > 24:
            raise IncompatibleAdapter(f"{len(ranks)} adapters do not fit together")

    def load(self, resolved: FakeResolved, *, pin: bool = False) -> None:
        self._put(resolved, pinned=pin)

    def _put(
        self, resolved: FakeResolved, *, state: str = "resident", pinned: bool = False
    ) -> None:
        self.resident[resolved.digest] = FakeResident(
            resolved.name, resolved.version, resolved.digest, state, pinned, 8, 4096, 0
        )

    def readmit(self, digest: str) -> None:
        self.refused.pop(digest, None)

    def verdict(self, digest: str) -> Verdict | None:
        return self.verdicts.get(digest)

    def quarantined(self) -> tuple[str, ...]:
        return tuple(self.refused)

    def unload(self, digest: str) -> None:
        self.resident.pop(digest, None)

    def has_copy(self, digest: str) -> bool:
        return digest in self.copies

    def host_stats(self) -> HostStats:
        return HostStats(num_adapters=1, num_bytes=4096, num_hits=3, num_misses=2)

    def pin(self, digest: str, *, pinned: bool = True) -> FakeResident | None:
        resident = self.resident.get(digest)
        if resident is not None:
            self.resident[digest] = resident = replace(resident, pinned=pinned)
        return resident

    def listen(self, listener: Callable[[str, Any, str], object]) -> None:
        self.listener = listener

    def snapshot(self) -> list[FakeResident]:
        return list(self.resident.values())


class Gate(threading.Event):
    """Lets the engine step while it is set; once ``clear`` has returned, no step is under way."""

    def __init__(self, stepping: threading.RLock) -> None:
        super().__init__()
        self._stepping = stepping

    def clear(self) -> None:
        with self._stepping:
            super().clear()


class FakeEngine:
    """Steps on a thread of its own; ``gate`` cleared holds it before the next step."""

    def __init__(self, deliver: Callable[[list[Output]], None], observer: Observer) -> None:
        self._deliver = deliver
        self._observer = observer
        self._lock = threading.RLock()
        self._running: list[tuple[Request, list[int]]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fake-engine")
        self._hold_at = 0
        self.gate = Gate(self._lock)
        self.gate.set()
        self.cancelled: list[str] = []
        self.submitted: list[Request] = []
        self.refusal: LoraryError | None = None
        self.bomb: Exception | None = None
        self.num_steps = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def num_running(self) -> int:
        return sum(r.lease.is_ready for r, _ in self._running)

    @property
    def num_waiting(self) -> int:
        return sum(not r.lease.is_ready for r, _ in self._running)

    def hold_at(self, num_tokens: int) -> None:
        """Close the gate as soon as an answer has so many tokens, and is to have more."""
        self._hold_at = num_tokens

    def submit(self, request: Request) -> None:
        if self._stopping:
            raise Unavailable("the engine is stopping")
        if self.refusal is not None:
            raise self.refusal
        with self._lock:
            self.submitted.append(request)
            self._running.append((request, []))

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self.cancelled.append(request_id)

    def shutdown(self) -> None:
        self._stopping = True
        self.gate.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.gate.wait()
                if self.bomb is not None:
                    raise self.bomb
                self._step()
                time.sleep(0.001)
        except Exception as error:  # noqa: BLE001 - the top of a thread
            self._end_all(LoraryError("engine down"))
            self._observer.on_error(error)
            return
        self._end_all(Unavailable("the engine has stopped"))

    def _step(self) -> None:
        with self._lock:
            if not self.gate.is_set():
                return
            outputs = []
            for entry in list(self._running):
                output = self._advance(*entry)
                if output is None:
                    continue
                outputs.append(output)
                if output.finish is not None or output.error is not None:
                    self._running.remove(entry)
                    entry[0].lease.release()
            if self._hold_at and any(len(told) >= self._hold_at for _, told in self._running):
                self._hold_at = 0
                self.gate.clear()
            if outputs:
                self.num_steps += 1
                self._observer.on_step(self._stats(outputs))
                self._deliver(outputs)

    def _advance(self, request: Request, tokens: list[int]) -> Output | None:
        error = request.lease.error
        if request.request_id in self.cancelled:
            error = Cancelled("cancelled")
        elif request.deadline_s is not None and time.monotonic() >= request.deadline_s:
            error = DeadlineExceeded("the deadline passed")
        if error is not None:
            return Output(request_id=request.request_id, index=request.index, error=error)
        if not request.lease.is_ready:
            return None
        number = ADAPTERS.get(getattr(request.lease, "name", ""), 0)
        last = (*request.prompt_ids, *tokens)[-1]
        token = (last + number + 1) % VOCAB
        if request.pooling is not None:
            return self._output(request, tokens, embedding=pooled(request, number))
        if request.labels:
            scores = tuple(-float(abs(ids[0] - token)) for ids in request.labels)
            return self._output(request, tokens, scores=scores)
        tokens.append(token)
        return self._output(request, tokens)

    def _output(
        self,
        request: Request,
        tokens: list[int],
        scores: tuple[float, ...] = (),
        embedding: tuple[float, ...] = (),
    ) -> Output:
        output = Output(request_id=request.request_id, index=request.index)
        if not scores and not embedding:
            output.token_ids, output.text = [tokens[-1]], f"{tokens[-1]} "
            if request.sampling.logprobs is not None:
                top = tuple((i, -1.0) for i in range(request.sampling.logprobs))
                output.logprobs = (PositionLogprobs(chosen=(tokens[-1], -0.5), top=top),)
        if scores or embedding or len(tokens) >= request.sampling.max_tokens:
            output.finish = Finish(
                reason="scored" if scores else "embedded" if embedding else "length",
                text="".join(f"{token} " for token in tokens),
                matched_stop="",
                prompt_tokens=len(request.prompt_ids),
                completion_tokens=len(tokens),
                cached_tokens=0,
                queue_ns=1,
                adapter_load_ns=2,
                prefill_ns=3,
                decode_ns=4,
                label_token_logprobs=tuple((score,) for score in scores),
                prompt_logprobs=self._prompt_logprobs(request),
                embedding=embedding,
                is_merged=request.execution == "merged",
            )
        return output

    def _prompt_logprobs(self, request: Request) -> tuple[PositionLogprobs, ...]:
        """Every token of a prompt but its first has -0.25, and 0 as its only alternative."""
        top = request.sampling.prompt_logprobs
        if top is None:
            return ()
        first, *rest = request.prompt_ids
        return (
            PositionLogprobs(chosen=(first, 0.0)),
            *(PositionLogprobs(chosen=(i, -0.25), top=((0, -1.0),) * top) for i in rest),
        )

    def _stats(self, outputs: list[Output]) -> StepStats:
        digests = {r.lease.digest for r, _ in self._running} - {""}
        return StepStats(
            seconds=0.001,
            num_decode_rows=len(outputs),
            num_prefill_tokens=0,
            num_distinct_adapters=len(digests),
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_waiting_for_adapter=self.num_waiting,
            kv_tokens_used=10,
            kv_tokens_total=CONTEXT * 4,
        )

    def _end_all(self, error: LoraryError) -> None:
        with self._lock:
            ended, self._running = self._running, []
        for request, _ in ended:
            request.lease.release()
        self._deliver(
            [Output(request_id=r.request_id, index=r.index, error=error) for r, _ in ended]
        )


def pooled(request: Request, number: int) -> tuple[float, ...]:
    """Return the vector of a request, worked out on paper."""
    assert request.pooling is not None
    ids = request.prompt_ids
    first = ids[-1] if request.pooling.kind == "last" else sum(ids) / len(ids)
    vector = (float(first), number + 3.0, 0.0, 4.0)[: request.pooling.dimensions]
    length = math.hypot(*vector) if request.pooling.is_normalized else 1.0
    return tuple(value / length for value in vector)


@dataclass
class Edge:
    """A running server around fakes, and a channel to it."""

    server: Server
    engine: FakeEngine
    residency: FakeResidency
    registry: FakeRegistry
    calls: Calls
    metrics: ServerMetrics
    address: str
    metrics_url: str
    channel: grpc.aio.Channel
    http: str = ""

    @property
    def inference(self) -> Any:
        return _stub(inference_pb2_grpc.InferenceStub, self.channel)

    @property
    def control(self) -> Any:
        return _stub(control_pb2_grpc.ControlStub, self.channel)


def _stub(kind: Any, channel: grpc.aio.Channel) -> Any:
    return kind(channel)


@asynccontextmanager
async def serving(
    *,
    limit: int = 64,
    registry: Any = None,
    residency: FakeResidency | None = None,
    merging: Any = None,
    fingerprint: str = FINGERPRINT,
    tracing: Callable[[ServerFacts], Tracing | None] = lambda facts: None,
    **options: Any,
) -> AsyncIterator[Edge]:
    """Start a server on free loopback ports; stop it, whatever the test did with it.

    ``registry``, with the ``fingerprint`` of its adapters' base, and ``residency`` replace the fakes.
    ``tracing`` makes what gives calls their spans.
    """
    values = {"base": "tiny", "registry": "unused", "port": 0, "metrics_port": 0, **options}
    config = ServerConfig(**values)
    # In frames of their own, unless a test is about those: how many steps pass meanwhile is chance.
    calls = Calls(limit, options.get("stream_frames", 0))
    metrics = ServerMetrics(num_tracked_adapters=config.tracked_adapters)
    engine, residency = FakeEngine(calls.deliver, metrics), residency or FakeResidency()
    registry = registry or FakeRegistry()
    facts = ServerFacts(
        version="0.0",
        base="tiny",
        base_fingerprint=fingerprint,
        quantization="none",
        device="cpu",
        dtype="float32",
        max_context=CONTEXT,
        max_batch=config.max_batch,
        max_rank=config.max_rank,
        adapter_memory_bytes=config.adapter_memory,
    )
    backend = Backend(
        engine=engine,
        residency=residency,
        compositions=Compositions(residency),
        registry=registry,
        prompts=FakePrompts(),
        grammars=FakeCompiler(),
        decode=lambda ids: "".join(f"{i} " for i in ids),
        facts=facts,
        limits=Limits(
            max_context=CONTEXT,
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            max_message=config.max_message,
        ),
        close=engine.shutdown,
        merging=merging,
    )
    server = Server(Core(config, backend, calls, metrics, tracing(facts)))
    addresses = await server.start()
    try:
        async with grpc.aio.insecure_channel(addresses.grpc) as channel:
            yield Edge(
                server,
                engine,
                residency,
                registry,
                calls,
                metrics,
                addresses.grpc,
                addresses.metrics,
                channel,
                addresses.http or "",
            )
    finally:
        engine.gate.set()
        await server.stop()


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until ``condition`` holds; fail the test when it never does."""
    import asyncio

    for _ in itertools.count():
        if condition():
            return
        timeout_s -= 0.01
        assert timeout_s > 0, "never became true"
        await asyncio.sleep(0.01)
