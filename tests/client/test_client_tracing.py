"""Calls of a traced program carry its trace; a program that is not traced reads no OpenTelemetry."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from opentelemetry.sdk.trace import TracerProvider

from lorary.client.tracing import with_trace


class Stub:
    """Keeps the metadata of its last call."""

    def Generate(self, request: str, *, metadata: Any = (), timeout: float = 0.0) -> str:
        self.metadata, self.timeout = metadata, timeout
        return request


def test_a_call_within_a_span_carries_its_traceparent_beside_what_it_has() -> None:
    inner = Stub()
    stub = with_trace(inner)
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("app")
    with tracer.start_as_current_span("work") as span:
        assert stub.Generate("hello", metadata=(("authorization", "x"),), timeout=3.0) == "hello"
    ids = span.get_span_context()
    assert inner.metadata == (
        ("authorization", "x"),
        ("traceparent", f"00-{ids.trace_id:032x}-{ids.span_id:016x}-{ids.trace_flags:02x}"),
    )
    assert inner.timeout == 3.0


def test_a_call_outside_of_a_span_carries_nothing() -> None:
    inner = Stub()
    with_trace(inner).Generate("hello")
    assert inner.metadata == ()


def test_the_client_reads_no_opentelemetry_by_itself() -> None:
    program = """
import sys
import grpc
from lorary.client import Client
from lorary.errors import Unavailable
try:
    Client("127.0.0.1:1", timeout_s=0.05).server_info()
except Exception as error:
    assert type(error).__name__ in ("Unavailable", "DeadlineExceeded"), error
sys.exit("opentelemetry" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
