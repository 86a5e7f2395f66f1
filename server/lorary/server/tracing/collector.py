"""From ``--otlp-endpoint`` to a tracer: what is asked for, sampling, the exporter, and the last flush.

OpenTelemetry's own environment variables hold as its specification says: ``OTEL_SERVICE_NAME``,
``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``, ``OTEL_PROPAGATORS``, ``OTEL_BSP_*``,
``OTEL_EXPORTER_OTLP_*``. ``OTEL_SDK_DISABLED=true`` and ``OTEL_TRACES_EXPORTER=none`` turn traces off.

Spans go into a bounded queue and leave from a thread of their own; whatever the collector does, a call
waits for nothing. What the queue cannot hold is dropped, and the log says so.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lorary.errors import ConfigError, MissingDependency
from lorary.server.tracing.calls import Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from lorary.server.answers import ServerFacts
    from lorary.server.config import ServerConfig

log = logging.getLogger("lorary.server")

FLUSH_S = 5.0
"""What the last spans get at the end of a server; a collector that is away must not hold up a drain."""
HTTP_PORT = 4318
_HTTP_PATH = "/v1/traces"
_PROTOCOLS = ("grpc", "http/protobuf")
_ON = ("true", "1", "span_only", "span_and_event")


def check_tracing(config: ServerConfig) -> None:
    """Find out that traces cannot be sent as asked before minutes go into loading the base.

    Raises:
        MissingDependency: they are asked for, and OpenTelemetry is not installed.
        ConfigError: the protocol is none of OTLP's two.
    """
    if _is_wanted(config):
        _exporter_class(_protocol(config.otlp_endpoint or ""))


def open_tracing(config: ServerConfig, facts: ServerFacts) -> Tracing | None:
    """Return what makes spans and sends them; None where none are asked for.

    Raises:
        MissingDependency: as ``check_tracing``.
        ConfigError: as ``check_tracing``.
    """
    if not _is_wanted(config):
        return None
    endpoint = config.otlp_endpoint or ""
    protocol = _protocol(endpoint)
    exporter = _exporter_class(protocol)(endpoint=_url(endpoint, protocol))
    log.info("traces go to '%s' (%s)", endpoint, protocol)
    return tracing_to(exporter, facts, share=config.trace_share, flush_s=FLUSH_S)


def tracing_to(
    exporter: SpanExporter,
    facts: ServerFacts,
    *,
    share: float | None = None,
    flush_s: float = FLUSH_S,
) -> Tracing:
    """Return what makes spans, in batches for an exporter.

    Args:
        exporter: sends them; called on a thread of its own.
        facts: of the server, which every span is said to be from.
        share: part of the calls that is traced where the caller has not decided; None leaves it to
            ``OTEL_TRACES_SAMPLER``, whose default is all of them.
        flush_s: most seconds that the last spans get.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    ours = Resource.create(
        {
            "service.name": "lorary",
            "service.version": facts.version,
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            "lorary.base": facts.base,
            "lorary.base_fingerprint": facts.base_fingerprint,
            "lorary.quantization": facts.quantization,
            "lorary.device": facts.device,
        }
    )
    provider = TracerProvider(
        resource=ours.merge(OTELResourceDetector().detect()),
        sampler=None if share is None else ParentBased(TraceIdRatioBased(share)),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))

    def close() -> None:
        # The SDK waits half a minute for its thread, which waits for the collector; we do not.
        flush = threading.Thread(target=provider.shutdown, name="lorary-last-spans", daemon=True)
        flush.start()
        flush.join(flush_s)
        if flush.is_alive():
            log.warning("the last spans did not reach the collector within %g s", flush_s)
            exporter.shutdown()

    return Tracing(
        provider.get_tracer("lorary.server", facts.version),
        base=facts.base,
        has_content=_captures_content(),
        close=close,
    )


def _is_wanted(config: ServerConfig) -> bool:
    if config.otlp_endpoint is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() != "none"


def _captures_content() -> bool:
    """Whether prompts and answers are recorded: by the switch of OpenTelemetry's instrumentations."""
    value = os.environ.get("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "")
    return value.strip().lower() in _ON


def _protocol(endpoint: str) -> str:
    """Return OTLP's way to the collector: what the environment says, else what its port is for."""
    by_port = "http/protobuf" if urlsplit(endpoint).port == HTTP_PORT else "grpc"
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if given := os.environ.get(variable):
            if given not in _PROTOCOLS:
                raise ConfigError(f"{variable} is '{given}'; it is one of {', '.join(_PROTOCOLS)}.")
            return given
    return by_port


def _url(endpoint: str, protocol: str) -> str:
    """Return where spans go: over HTTP to a path of their own below what is given."""
    if protocol == "grpc" or endpoint.endswith(_HTTP_PATH):
        return endpoint
    return endpoint.rstrip("/") + _HTTP_PATH


def _exporter_class(protocol: str) -> Any:
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_exporter

            return grpc_exporter.OTLPSpanExporter
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_exporter

        return http_exporter.OTLPSpanExporter
    except ImportError as error:
        raise MissingDependency(
            f"--otlp-endpoint needs {error.name}: pip install 'lorary[otel]', or leave the option (and "
            "OTEL_EXPORTER_OTLP_ENDPOINT) out."
        ) from error
