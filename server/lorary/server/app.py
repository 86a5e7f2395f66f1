"""The server as a process has it: a core behind its own doors. Starts, drains and stops them.

Draining, after SIGTERM or SIGINT (a second one skips to 5)::

    1. health says NOT_SERVING; calls are still taken for --drain-delay
    2. new calls get UNAVAILABLE with RetryInfo
    3. running calls get --drain-timeout to end
    4. those that are left end with UNAVAILABLE
    5. HTTP, gRPC, engine, threads and /metrics stop, in this order; the last spans are sent; exit 0
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorary.errors import EngineFailed, MissingDependency
from lorary.pings import ping_options
from lorary.server.access.grants import read_grants
from lorary.server.core import LAST_WORDS_S, bracketed, port_error
from lorary.server.tls import check_files, server_credentials
from lorary.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from lorary.server.config import ServerConfig
    from lorary.server.core import Core
    from lorary.server.http.listener import Listener
    from lorary.server.open_inference.service import OpenInference

log = logging.getLogger("lorary.server")

INFERENCE = "lorary.v1.Inference"
KEEPALIVE_MS, PING_TIMEOUT_MS = 20_000, 10_000
"""A gRPC connection that was silent for so long is pinged, and an answer waited for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a server listens, with the ports that were taken for 0."""

    grpc: str
    metrics: str
    http: str | None = None


class Server:
    """A gRPC server and a /metrics server around one core, which it owns from here and closes."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._config = core.config
        self._calls = core.calls
        core.on_failure = self._on_failure
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._grpc: grpc.aio.Server | None = None
        self._http: Listener | None = None
        self._open_inference: OpenInference | None = None
        self._is_ready = False

    async def start(self) -> Addresses:
        """Listen, begin to step, and say so through health.

        Raises:
            ConfigError: a port is in use, or the host is not this machine's.
        """
        config, core = self._config, self._core
        core.attach()
        self._grpc = self._build_grpc()
        port = self._bind(self._grpc)
        metrics_port = core.open_metrics()
        http = None if config.http_port is None else await self._start_http()
        core.begin()
        await self._grpc.start()
        await core.health.begin()
        await core.health.set(INFERENCE, health_pb2.HealthCheckResponse.SERVING)
        self._is_ready = True
        host = bracketed(config.host)
        return Addresses(
            grpc=f"{host}:{port}", metrics=f"http://{host}:{metrics_port}/metrics", http=http
        )

    def request_stop(self) -> None:
        """Drain; asked a second time, stop at once."""
        if self._stop_asked.is_set():
            self._hurry.set()
        self._stop_asked.set()

    @property
    def was_hurried(self) -> bool:
        """Whether a second request cut the drain short."""
        return self._hurry.is_set()

    async def serve_until_stopped(self) -> None:
        """Serve until somebody asks to stop, then drain and stop everything.

        Raises:
            EngineFailed: the engine broke; everything else has been stopped.
        """
        try:
            await self._stop_asked.wait()
            if self._core.failure is None:
                await self._drain()
            else:
                await self._core.health.enter_graceful_shutdown()
        finally:
            await self.stop()
        failure = self._core.failure
        if failure is not None:
            raise EngineFailed(
                f"the engine failed ({type(failure).__name__}); the log above holds the cause. "
                "Restart the server."
            ) from failure

    async def stop(self) -> None:
        """Stop every part now, in order; idempotent."""
        await self._core.end_calls()
        if self._http is not None:
            await self._http.stop()
        if self._grpc is not None:
            await self._grpc.stop(LAST_WORDS_S)
        await self._core.close()

    async def _drain(self) -> None:
        config = self._config
        log.info("draining: %d calls in flight", self._calls.num_in_flight)
        self._is_ready = False
        await self._core.health.enter_graceful_shutdown()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), config.drain_delay)
        self._calls.refuse("the server is draining; try another replica.")
        idle = asyncio.ensure_future(self._calls.wait_idle(config.drain_timeout))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({idle, hurry}, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, hurry):
            task.cancel()
        if self._calls.num_in_flight:
            log.warning("ending %d calls that did not end in time", self._calls.num_in_flight)

    def _on_failure(self) -> None:
        """The engine broke, and every call has been ended: stop."""
        self._is_ready = False
        self._stop_asked.set()

    def _build_grpc(self) -> grpc.aio.Server:
        config, core = self._config, self._core
        server = grpc.aio.server(interceptors=core.interceptors(), options=grpc_options(config))
        register: Any = inference_pb2_grpc.add_InferenceServicer_to_server
        register(core.inference, server)
        register = control_pb2_grpc.add_ControlServicer_to_server
        register(core.control, server)
        described = [inference_pb2, control_pb2]
        if config.open_inference:
            from lorary.oip import open_inference_pb2, open_inference_pb2_grpc
            from lorary.server.open_inference.service import OpenInference

            self._open_inference = OpenInference(
                core.inference,
                core.parts,
                core.backend.registry,
                is_ready=lambda: self._is_ready,
                has_failed=lambda: core.failure is not None,
            )
            register = open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
            register(self._open_inference, server)
            described.append(open_inference_pb2)
        health_pb2_grpc.add_HealthServicer_to_server(core.health, server)
        if config.has_reflection:
            names = [
                service.full_name
                for module in described
                for service in module.DESCRIPTOR.services_by_name.values()
            ]
            names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, server)
        return server

    def _bind(self, server: grpc.aio.Server) -> int:
        address = f"{bracketed(self._config.host)}:{self._config.port}"
        tls = self._config.tls
        try:
            if tls is not None:
                return server.add_secure_port(address, server_credentials(tls))
            return server.add_insecure_port(address)
        except RuntimeError as error:
            raise port_error("--port", self._config.host, self._config.port) from error

    async def _start_http(self) -> str:
        """Open the HTTP door; return its address."""
        from lorary.server.http.app import build_app
        from lorary.server.http.console.routes import console_routes
        from lorary.server.http.listener import Listener

        config, core, host = self._config, self._core, self._config.http_address
        console = []
        if config.has_console:
            console = console_routes(
                core.control,
                core.parts,
                core.backend.registry,
                host=host,
                max_body=config.max_message,
                guard=core.guard,
            )
        v2 = []
        if self._open_inference is not None:
            from lorary.server.http.open_inference import open_inference_routes

            v2 = open_inference_routes(
                self._open_inference,
                core.metrics,
                max_body=config.max_message,
                guard=core.guard,
                tracing=core.tracing,
            )
        app = build_app(
            core.inference,
            core.control,
            core.parts,
            max_body=config.max_message,
            is_ready=lambda: self._is_ready,
            has_failed=lambda: core.failure is not None,
            guard=core.guard,
            further=[*console, *v2],
            tracing=core.tracing,
        )
        self._http = Listener(app, config.tls, stall_s=config.stall_timeout)
        try:
            port = await self._http.start(host, config.http_port or 0)
        except OSError as error:
            raise port_error("--http-port", host, config.http_port or 0) from error
        scheme = "http" if config.tls is None else "https"
        return f"{scheme}://{bracketed(host)}:{port}"


def grpc_options(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    """Return the channel options of the server; core ignores unknown names, so tests pin effects."""
    return (
        # Two servers must not share a port in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message),
        ("grpc.max_send_message_length", config.max_message),
        # The rows of a peer that is gone without a FIN are freed.
        *ping_options(KEEPALIVE_MS, PING_TIMEOUT_MS),
        # Clients that wait on a silent stream, or on none, may ping as often as each second.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 900),
    )


def check_files_of(config: ServerConfig) -> None:
    """Find out that a file of TLS or of tenants is no good before minutes go into loading the base.

    Raises:
        ConfigError: it is not.
    """
    if config.tls is not None:
        check_files(config.tls)
    if config.access is not None:
        grants = read_grants(config.access)
        if grants.by_certificate and config.tls_client_ca is None:
            log.warning(
                "'%s' knows tenants by certificate, and no client is asked for one: give --tls-client-ca",
                config.access,
            )


def check_ports_free(config: ServerConfig) -> None:
    """Find out that a port is in use before minutes go into loading the base.

    Raises:
        MissingDependency: there is to be an HTTP door, and its libraries are not installed.
        ConfigError: it is, or the host is not this machine's.
    """
    listens = [
        ("--port", config.host, config.port),
        ("--metrics-port", config.host, config.metrics_port),
    ]
    if config.http_port is not None:
        check_http_installed()
        listens.append(("--http-port", config.http_address, config.http_port))
    for name, host, port in listens:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise port_error(name, host, port) from error


def check_http_installed() -> None:
    """Find out that the HTTP door cannot open before minutes go into loading the base.

    Raises:
        MissingDependency: its libraries are not installed.
    """
    try:
        from lorary.server.http import app, listener  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"--http-port needs {error.name}: pip install 'lorary[http]', or leave the option out."
        ) from error


def handle_signals(server: Server) -> None:
    """Let SIGTERM and SIGINT drain the server, and the second of them stop it."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.request_stop)
