"""What a call's trace says, at both doors; and that a collector which is away costs calls nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc.aio
import httpx2 as httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lorary.errors import ConfigError, CorruptArtifact, LoraryError, MissingDependency
from lorary.oip import open_inference_pb2 as oip
from lorary.oip import open_inference_pb2_grpc
from lorary.server import logs
from lorary.server.access.tokens import token_hash
from lorary.server.config import ServerConfig
from lorary.server.on_ray.replica_call import ReplicaCall
from lorary.server.tracing import collector
from lorary.server.tracing.span import MAX_TOLD, watched
from lorary.v1 import control_pb2
from lorary.v1 import inference_pb2 as pb
from tests.edge.fakes import FINGERPRINT, digest_of, eventually, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

    from tests.edge.fakes import Edge

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
NOT_SAMPLED = f"00-{TRACE}-{PARENT}-00"
SECRET = "2 5 41"


class Seen(InMemorySpanExporter):
    """The spans that a collector would have got."""

    async def calls(self, count: int = 1) -> list[ReadableSpan]:
        """Return the first ``count`` calls' spans, once they are there."""
        await eventually(lambda: len(self._of_calls()) >= count)
        return self._of_calls()

    def children(self, call: ReadableSpan) -> dict[str, ReadableSpan]:
        """Return a call's children by name."""
        assert call.context is not None
        return {
            span.name: span
            for span in self.get_finished_spans()
            if span.parent is not None and span.parent.span_id == call.context.span_id
        }

    def _of_calls(self) -> list[ReadableSpan]:
        return [span for span in self.get_finished_spans() if span.kind == SpanKind.SERVER]


@pytest.fixture(autouse=True)
def _quick_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@asynccontextmanager
async def traced(seen: Seen, *, share: float | None = None, **options: Any) -> AsyncIterator[Edge]:
    async with serving(
        tracing=lambda facts: collector.tracing_to(seen, facts, share=share), **options
    ) as edge:
        yield edge


def generate(edge: Edge, adapter: str, *headers: tuple[str, str], **sampling: Any) -> Any:
    request = pb.GenerateRequest(
        adapter=adapter,
        input=pb.Input(prompt=SECRET),
        sampling=pb.SamplingParams(**sampling),
        request_id="mine",
    )
    return edge.inference.Generate(request, metadata=headers)


async def consume(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_call_is_one_span_in_the_callers_trace_with_its_phases() -> None:
    seen, started = Seen(), time.monotonic()
    async with traced(seen) as edge:
        await consume(generate(edge, "beta@prod", ("traceparent", SAMPLED), max_tokens=3, n=2))
        (call,) = await seen.calls()
    assert call.context is not None
    assert call.parent is not None
    assert (f"{call.context.trace_id:032x}", f"{call.parent.span_id:016x}") == (TRACE, PARENT)
    assert call.name == "text_completion beta"
    assert call.status.status_code == StatusCode.UNSET
    said = dict(call.attributes or {})
    to_first_s: Any = said.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < to_first_s < time.monotonic() - started
    assert said == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "lorary",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.model": "beta@prod",
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.response.model": "beta@1",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 6,
        "lorary.adapter.digest": digest_of("beta"),
        "lorary.adapter.name": "beta",
        "lorary.adapter.version": 1,
        "lorary.canary": False,
        "lorary.request_id": "mine",
        "rpc.method": "lorary.v1.Inference/Generate",
        "rpc.response.status_code": "OK",
        "rpc.system.name": "grpc",
    }
    resource = call.resource.attributes
    assert (resource["service.name"], resource["lorary.base_fingerprint"]) == (
        "lorary",
        FINGERPRINT,
    )
    # The fakes' timings: 1 ns in the queue, 2 of load, 3 of prefill, 4 of decoding.
    lengths = {name: length(span) for name, span in seen.children(call).items()}
    assert lengths == {
        "lorary.queue": 1, "lorary.adapter_load": 2, "lorary.prefill": 3, "lorary.decode": 4
    }  # fmt: skip
    assert len(seen.get_finished_spans()) == 1 + 2 * 4


def length(span: ReadableSpan) -> int:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.end_time - span.start_time


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_chat_over_http_is_the_same_trace(is_stream: bool) -> None:
    seen = Seen()
    body = {"model": "beta", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
    headers = {"traceparent": SAMPLED, "x-request-id": "mine"}
    async with traced(seen, http_port=0) as edge:
        async with httpx.AsyncClient(base_url=edge.http, headers=headers) as http:
            done = await http.post("/v1/chat/completions", json={**body, "stream": is_stream})
            assert done.status_code == 200
            assert (await http.get("/health")).status_code == 200
        (call,) = await seen.calls()
    assert call.parent is not None
    assert f"{call.parent.span_id:016x}" == PARENT
    assert call.name == "chat beta"
    said = dict(call.attributes or {})
    assert said.get("gen_ai.request.stream", False) is is_stream
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.usage.output_tokens": 2,
        "lorary.adapter.digest": digest_of("beta"),
        "lorary.request_id": "mine",
    }
    assert expected.items() <= said.items()
    assert set(seen.children(call)) >= {"lorary.queue", "lorary.prefill", "lorary.decode"}


async def test_a_call_that_ray_brings_is_traced_like_any() -> None:
    """Serve passes the caller's metadata on; the interceptors are the same."""
    seen = Seen()
    request = pb.GenerateRequest(
        adapter="beta", input=pb.Input(prompt="2 5"), sampling=pb.SamplingParams(max_tokens=1)
    )
    given: Any = SimpleNamespace(
        invocation_metadata=lambda: (("traceparent", SAMPLED),),
        set_trailing_metadata=lambda facts: None,
    )
    async with traced(seen) as edge:
        core = edge.server._core
        path = "/lorary.v1.Inference/Generate"
        call = ReplicaCall(given, lambda name: None)
        async for _ in call.stream(path, core.inference.Generate, request, core.interceptors()):
            pass
        (span,) = await seen.calls()
    assert span.parent is not None
    assert (span.name, f"{span.parent.span_id:016x}") == ("text_completion beta", PARENT)
    assert "lorary.decode" in seen.children(span)


async def test_prompts_of_one_body_are_one_span_with_the_phases_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    seen = Seen()
    body = {"model": "alpha", "prompt": ["2 5", "9"], "max_tokens": 2}
    async with traced(seen, http_port=0) as edge:
        async with httpx.AsyncClient(base_url=edge.http) as http:
            assert (await http.post("/v1/completions", json=body)).status_code == 200
        (call,) = await seen.calls()
    said = call.attributes or {}
    assert said["gen_ai.usage.input_tokens"] == 3
    assert said["gen_ai.usage.output_tokens"] == 4
    assert said["gen_ai.response.finish_reasons"] == ("length", "length")
    read = {
        (span.attributes or {})["lorary.prompt"]: (span.attributes or {})["lorary.prompt_tokens"]
        for span in seen.get_finished_spans()
        if span.name == "lorary.prefill"
    }
    assert read == {0: 2, 1: 1}
    asked = json.loads(str(said["gen_ai.input.messages"]))
    assert [one["parts"][0]["content"] for one in asked] == ["2 5", "9"]


async def test_of_many_inputs_only_some_have_phases_and_all_are_counted() -> None:
    seen, inputs = Seen(), [pb.Input(prompt="2 5") for _ in range(20)]
    async with traced(seen) as edge:
        await edge.inference.Embed(pb.EmbedRequest(adapter="beta", inputs=inputs))
        (call,) = await seen.calls()
    assert call.name == "embeddings beta"
    assert (call.attributes or {})["gen_ai.usage.input_tokens"] == 40
    prefills = [s for s in seen.get_finished_spans() if s.name == "lorary.prefill"]
    assert len(prefills) == MAX_TOLD


async def test_a_tenants_refused_call_names_the_tenant_and_the_error(tmp_path: Path) -> None:
    seen, token = Seen(), f"lry_acme-{'x' * 40}"
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants: {{acme: {{tokens: [{token_hash(token)}], adapters: ['al*']}}}}")
    body = {"model": "beta", "prompt": SECRET}
    async with traced(seen, http_port=0, access=tenants) as edge:
        async with httpx.AsyncClient(base_url=edge.http) as http:
            headers = {"authorization": f"Bearer {token}"}
            assert (await http.post("/v1/completions", json=body)).status_code == 401
            done = await http.post("/v1/completions", json=body, headers=headers)
            assert done.status_code == 404
        stranger, known = await seen.calls(2)
    assert (stranger.attributes or {})["error.type"] == "UNAUTHENTICATED"
    assert "lorary.tenant" not in (stranger.attributes or {})
    expected = {
        "error.type": "ADAPTER_NOT_FOUND",
        "http.response.status_code": 404,
        "lorary.phase": "prepare",
        "lorary.tenant": "acme",
    }
    assert expected.items() <= dict(known.attributes or {}).items()
    # It may not know of beta, so it shall not find it in a trace either.
    assert known.name == "POST /v1/completions"
    assert "lorary.adapter.name" not in (known.attributes or {})
    assert token not in known.to_json() + stranger.to_json()


async def test_calls_of_the_open_inference_protocol_have_spans() -> None:
    seen = Seen()
    async with traced(seen, open_inference=True) as edge:
        kind: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub
        stub = kind(edge.channel)
        request = oip.ModelInferRequest(model_name="alpha")
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"2 5")
        await stub.ServerReady(oip.ServerReadyRequest())
        await stub.ModelInfer(request, metadata=(("traceparent", SAMPLED),))
        (call,) = await seen.calls()
    assert call.name == "text_completion alpha"
    assert call.parent is not None
    assert f"{call.parent.span_id:016x}" == PARENT
    assert (call.attributes or {})["rpc.method"] == "inference.GRPCInferenceService/ModelInfer"


async def test_scores_and_control_have_spans_and_health_has_none() -> None:
    seen = Seen()
    async with traced(seen) as edge:
        request = pb.ClassifyRequest(adapter="beta", input=pb.Input(prompt="2 5"))
        await edge.inference.Classify(request)
        await edge.control.ListAdapters(control_pb2.ListAdaptersRequest())
        stub = health_pb2_grpc.HealthStub(edge.channel)
        await stub.Check(health_pb2.HealthCheckRequest())
        scored, listed = await seen.calls(2)
    assert len(seen.get_finished_spans()) == 2 + 3  # a score has no decoding
    assert scored.name == "classify beta"
    assert (scored.attributes or {})["gen_ai.usage.output_tokens"] == 0
    assert listed.name == "lorary.v1.Control/ListAdapters"
    assert "gen_ai.operation.name" not in (listed.attributes or {})


async def test_vectors_have_one_span_with_the_phases_of_each_input() -> None:
    seen = Seen()
    async with traced(seen) as edge:
        inputs = [pb.Input(prompt="2 5"), pb.Input(prompt="7")]
        request = pb.EmbedRequest(adapter="beta", inputs=inputs, dimensions=2)
        await edge.inference.Embed(request)
        (embedded,) = await seen.calls(1)
    assert len(seen.get_finished_spans()) == 1 + 2 * 3
    assert embedded.name == "embeddings beta"
    expected = {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.embeddings.dimension.count": 2,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 0,
    }
    assert expected.items() <= dict(embedded.attributes or {}).items()


async def refused(edge: Edge) -> Any:
    return generate(edge, "no-such-adapter")


async def broken(edge: Edge) -> Any:
    edge.residency.slow.add("alpha")
    call = generate(edge, "alpha")
    await eventually(lambda: bool(edge.engine.submitted))
    edge.residency.fail("alpha", CorruptArtifact(SECRET))
    return call


async def private(edge: Edge) -> Any:
    edge.registry.broken = LoraryError(f"/srv/{SECRET}")
    return generate(edge, "alpha")


@pytest.mark.parametrize(
    ("ask", "code", "why", "status", "phase"),
    [
        (refused, "NOT_FOUND", "ADAPTER_NOT_FOUND", StatusCode.UNSET, "prepare"),
        (broken, "DATA_LOSS", "CORRUPT_ARTIFACT", StatusCode.ERROR, "waiting"),
        (private, "INTERNAL", "LORARY_ERROR", StatusCode.ERROR, "prepare"),
    ],
)
async def test_how_a_call_failed_is_what_the_table_of_errors_says(
    ask: Any, code: str, why: str, status: StatusCode, phase: str
) -> None:
    seen = Seen()
    async with traced(seen) as edge:
        with pytest.raises(grpc.aio.AioRpcError):
            await consume(await ask(edge))
        (call,) = await seen.calls()
    said = call.attributes or {}
    assert (said["rpc.response.status_code"], said["error.type"]) == (code, why)
    assert (call.status.status_code, said["lorary.phase"]) == (status, phase)
    assert "no-such-adapter" not in call.name
    assert SECRET not in call.to_json()


async def test_a_cancelled_call_tells_its_phase_and_the_tokens_it_got() -> None:
    seen = Seen()
    async with traced(seen) as edge:
        edge.engine.hold_at(1)
        call = generate(edge, "alpha", max_tokens=60)
        await call.read()
        call.cancel()
        (span,) = await seen.calls()
        edge.engine.gate.set()
    said = span.attributes or {}
    assert (said["error.type"], said["lorary.phase"]) == ("CANCELLED", "decode")
    assert said["gen_ai.usage.output_tokens"] >= 1  # type: ignore[operator]
    assert span.status.status_code == StatusCode.UNSET
    waiting, decode = (seen.children(span)[f"lorary.{name}"] for name in ("waiting", "decode"))
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= waiting.start_time < waiting.end_time  # type: ignore[operator]
    assert waiting.end_time == decode.start_time
    assert decode.end_time <= span.end_time  # type: ignore[operator]
    # It ended where the caller left it, and not where the engine, which was held, would have gone on.
    assert (decode.attributes or {})["lorary.generated_tokens"] == said[
        "gen_ai.usage.output_tokens"
    ]


async def test_prompts_and_answers_are_told_only_where_the_conventions_switch_is_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent, open_ = Seen(), Seen()
    async with traced(silent) as edge:
        await consume(generate(edge, "beta", max_tokens=2))
        await silent.calls()
    everything = "".join(span.to_json() for span in silent.get_finished_spans())
    assert SECRET not in everything
    assert "44 47" not in everything
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    async with traced(open_) as edge:
        await consume(generate(edge, "beta", max_tokens=2))
        (call,) = await open_.calls()
    asked, told = (
        json.loads(str((call.attributes or {})[f"gen_ai.{side}.messages"]))
        for side in ("input", "output")
    )
    assert asked == [{"role": "user", "parts": [{"type": "text", "content": SECRET}]}]
    assert told == [{"role": "assistant", "parts": [{"type": "text", "content": "44 47 "}]}]


async def test_sampling_follows_the_caller_and_logs_name_the_trace_either_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen, lines = Seen(), list[str]()
    monkey = logging.getLogger("lorary.server")
    handler = _Lines(lines)
    monkey.addHandler(handler)
    caplog.set_level(logging.DEBUG, "lorary.server")
    try:
        async with traced(seen, share=0.0) as edge:
            await consume(generate(edge, "beta", ("traceparent", NOT_SAMPLED), max_tokens=1))
            await consume(generate(edge, "alpha", max_tokens=1))
            await consume(generate(edge, "beta", ("traceparent", SAMPLED), max_tokens=1))
            await seen.calls()
    finally:
        monkey.removeHandler(handler)
    assert len(await seen.calls()) == 1
    ended = [one for one in map(json.loads, lines) if "ended: OK" in one["message"]]
    assert [one["adapter_digest"] for one in ended] == [
        digest_of(name) for name in ("beta", "alpha", "beta")
    ]
    assert [one["request_id"] for one in ended] == ["mine"] * 3
    assert [one["trace_id"] == TRACE for one in ended] == [True, False, True]
    assert all(len(one["span_id"]) == 16 for one in ended)


class _Lines(logging.Handler):
    """Keeps the lines of a JSON log."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines
        self.setFormatter(logs._Json())

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


async def test_without_traces_nothing_stands_between_engine_and_metrics(edge: Edge) -> None:
    meters: Sequence[Any] = [object()]
    await consume(generate(edge, "beta", max_tokens=1))
    assert watched(meters, edge.engine.submitted[0]) is meters
    assert not any(type(one).__name__ == "TracingInterceptor" for one in interceptors(edge))


def interceptors(edge: Edge) -> Sequence[Any]:
    return edge.server._core.interceptors()


@pytest.mark.parametrize("port", [4317, 4318])
async def test_a_collector_that_is_away_neither_slows_calls_nor_the_end(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens there; ``port`` only decides how it is spoken to.

    One export alone would be tried for ten seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = probe.getsockname()[1]
        protocol = "grpc" if port == 4317 else "http/protobuf"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
        monkeypatch.setattr(collector, "FLUSH_S", 0.5)
        config = ServerConfig(base="b", registry="r", otlp_endpoint=f"http://127.0.0.1:{nobody}")
        async with serving(tracing=lambda facts: collector.open_tracing(config, facts)) as edge:
            started = time.monotonic()
            await asyncio.gather(
                *(consume(generate(edge, "alpha", max_tokens=2)) for _ in range(20))
            )
            assert time.monotonic() - started < 8.0
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 8.0


async def test_over_http_spans_are_protobuf_posted_to_a_path_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    got: list[tuple[str, str, bytes]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, self.headers["x-key"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        config = ServerConfig(
            base="b", registry="r", otlp_endpoint=f"http://127.0.0.1:{http.server_port}"
        )
        async with serving(tracing=lambda facts: collector.open_tracing(config, facts)) as edge:
            await edge.inference.GetServerInfo(pb.GetServerInfoRequest())
        http.shutdown()
        thread.join()
    ((path, key, body),) = got
    assert (path, key) == ("/v1/traces", "secret")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert resource.scope_spans[0].spans[0].name == "lorary.v1.Inference/GetServerInfo"


@pytest.mark.parametrize(
    ("endpoint", "environment", "url"),
    [
        ("http://c:4317", {}, "http://c:4317"),
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("https://c/otlp/", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "https://c/otlp/v1/traces"),
        ("http://c:4318/v1/traces", {}, "http://c:4318/v1/traces"),
        ("http://c:4318", {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, "http://c:4318"),
    ],
)  # fmt: skip
def test_the_way_to_the_collector(
    endpoint: str, environment: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert collector._url(endpoint, collector._protocol(endpoint)) == url


def test_asked_for_and_not_installed_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(base="b", registry="r", otlp_endpoint="http://127.0.0.1:4317")
    collector.check_tracing(config)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc", None)
    with pytest.raises(MissingDependency, match=r"pip install 'lorary\[otel\]'"):
        collector.check_tracing(config)
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            collector.check_tracing(config)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ConfigError, match="http/json"):
        collector.check_tracing(config)


def test_a_server_that_cannot_trace_says_so_before_it_loads_anything() -> None:
    arguments = ["lorary", "serve", "--base", "/no/such/base", "--port", "0", "--metrics-port", "0"]
    program = (
        "import sys\n"
        "sys.modules['opentelemetry.exporter.otlp.proto.grpc'] = None\n"
        f"sys.argv = {arguments!r}\n"
        "from lorary.cli.main import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 78, done.stderr
    assert "pip install 'lorary[otel]'" in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"otlp_endpoint": "collector:4317"}, "it is a URL"),
        ({"otlp_endpoint": "http://:4317"}, "it is a URL"),
        ({"otlp_endpoint": "http://c:99999"}, "it is a URL"),
        ({"trace_share": 0.5}, "no --otlp-endpoint"),
        ({"otlp_endpoint": "http://c:4317", "trace_share": 2.0}, "between 0 and 1"),
    ],
)
def test_impossible_switches_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ServerConfig(base="b", registry="r", **options)


def test_opentelemetry_says_the_same_once_a_minute() -> None:
    seldom = logs._Seldom()

    def record(name: str, line: int) -> logging.LogRecord:
        return logging.LogRecord(name, logging.ERROR, "f", line, "away", None, None)

    kept = [seldom.filter(record("opentelemetry.exporter", line)) for line in (1, 1, 2)]
    assert kept == [True, False, True]
    assert all(seldom.filter(record("lorary.server", 1)) for _ in range(2))
