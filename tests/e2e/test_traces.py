"""Traces from a real server to a real receiver: what is on the wire, and that a drain sends the last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import TracerProvider

from lorary.client import AsyncClient, Client
from tests.processes import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import World

_Servicer: Any = trace_service_pb2_grpc.TraceServiceServicer


class Receiver(_Servicer):  # type: ignore[misc]
    """The collector's end of OTLP."""

    def __init__(self) -> None:
        self.resources: list[trace_pb2.ResourceSpans] = []

    def Export(self, request: Any, context: Any) -> Any:
        """Take one batch."""
        self.resources += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[trace_pb2.Span]:
        return [s for r in self.resources for scope in r.scope_spans for s in scope.spans]


@pytest.fixture
def collector() -> Iterator[tuple[Receiver, str]]:
    """A receiver, and its address."""
    receiver, server = Receiver(), grpc.server(ThreadPoolExecutor(1))
    register: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    register(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def facts(message: Any) -> dict[str, Any]:
    """Return attributes as the wire has them."""
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value")) for one in message.attributes
    }


async def test_a_clients_trace_goes_on_in_the_server_and_arrives_by_the_end_of_its_drain(
    world: World,
    collector: tuple[Receiver, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receiver, endpoint = collector
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    # So long that nothing but the drain sends what is there.
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("app")
    switches = ("--otlp-endpoint", endpoint, "--verify", "off")
    with serving(world.base, world.registry, tmp_path, *switches) as server:
        with Client(server.address, timeout_s=60) as client:
            with tracer.start_as_current_span("work") as work:
                answer = client.generate(prompt="the cat", adapter="bravo@prod", max_tokens=4)
            client.generate(prompt="the cat", max_tokens=2)
        async with AsyncClient(server.address, timeout_s=60) as client:
            with tracer.start_as_current_span("work too") as later:
                await client.classify("the cat", adapter="judge")
        assert not receiver.spans
    (resource,) = receiver.resources
    assert facts(resource.resource)["service.name"] == "lorary"
    assert facts(resource.resource)["deployment.environment.name"] == "test"
    ids = work.get_span_context()
    by_trace = {span.trace_id for span in receiver.spans}
    assert len(by_trace) == 3
    assert later.get_span_context().trace_id.to_bytes(16, "big") in by_trace
    mine = [s for s in receiver.spans if s.trace_id == ids.trace_id.to_bytes(16, "big")]
    (call,) = [span for span in mine if span.parent_span_id == ids.span_id.to_bytes(8, "big")]
    assert call.name == "text_completion bravo"
    said = facts(call)
    assert said["lorary.adapter.digest"] == answer.receipt.digest
    assert said["lorary.request_id"] == answer.receipt.request_id
    assert said["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens
    phases = {s.name: s for s in mine if s.parent_span_id == call.span_id}
    # Nobody had asked for bravo before, so this call waited for it.
    queue, load = phases["lorary.queue"], phases["lorary.adapter_load"]
    prefill, decode = phases["lorary.prefill"], phases["lorary.decode"]
    assert call.start_time_unix_nano <= queue.start_time_unix_nano <= load.start_time_unix_nano
    assert load.end_time_unix_nano <= queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= call.end_time_unix_nano
    assert load.end_time_unix_nano > load.start_time_unix_nano
