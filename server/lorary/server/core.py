"""What serves calls, whoever brings them: ``app.Server`` through its own doors, or Ray (``on_ray``).

A core is built around one backend, begun on the event loop that brings the calls, and closed there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import start_http_server

from lorary.errors import ConfigError, EngineFailed, Unavailable
from lorary.server.access.grants import GrantsFile
from lorary.server.access.guard import AccessInterceptor, Guard
from lorary.server.control import ControlService
from lorary.server.interceptors import (
    DecodingInterceptor,
    ErrorInterceptor,
    MetricsInterceptor,
    RequestIdInterceptor,
)
from lorary.server.rollout.build import build_rollout
from lorary.server.rollout.health import AdapterHealth
from lorary.server.router_metrics import AskedRefs, RouterCollector
from lorary.server.service import InferenceService, Parts
from lorary.server.state_metrics import LoopCollector
from lorary.server.targets import Prompts, Targets
from lorary.server.tracing.calls import TracingInterceptor

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.server.build import Backend
    from lorary.server.calls import Calls
    from lorary.server.config import ServerConfig
    from lorary.server.interceptors import Around
    from lorary.server.metrics import ServerMetrics
    from lorary.server.tracing.calls import Tracing

# After every call was ended, what the doors need to say so.
LAST_WORDS_S = 1.0


class Core:
    """The services around one backend, and what they work with.

    Args:
        config: how it runs.
        backend: engine, residency, registry and prompts, already built; the core owns them from here
            and stops them.
        calls: what the engine delivers to.
        metrics: what engine and residency report to.
        tracing: gives calls spans, and is closed with the core; None gives none.

    Attributes:
        failure: what broke the engine; None while it works.
        on_failure: called on the event loop when the engine breaks, after every call was ended.
    """

    def __init__(
        self,
        config: ServerConfig,
        backend: Backend,
        calls: Calls,
        metrics: ServerMetrics,
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        self.tracing = tracing
        self.backend = backend
        self.calls = calls
        self.metrics = metrics
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._targets = Targets(
            backend.registry,
            base=backend.facts.base,
            fingerprint=backend.facts.base_fingerprint,
        )
        self._prompts = Prompts(backend.prompts, backend.decode, tool_format=config.tool_format)
        self.guard = None if config.access is None else Guard(GrantsFile(config.access))
        self.rollout = build_rollout(backend, self._targets, calls, poll_s=config.alias_poll)
        self.control = ControlService(
            backend.registry,
            backend.residency,
            self._targets,
            self.rollout,
            calls,
            backend.merging,
        )
        self.health = AdapterHealth(self._targets, backend.residency, self.rollout.feed)
        self.rollout.follower.on_trouble = self.health.on_trouble
        self.parts = Parts(
            engine=backend.engine,
            residency=backend.residency,
            compositions=backend.compositions,
            targets=self._targets,
            prompts=self._prompts,
            grammars=backend.grammars,
            calls=calls,
            metrics=metrics,
            facts=backend.facts,
            limits=backend.limits,
            rollout=self.rollout,
            stall_s=config.stall_timeout,
            merging=backend.merging,
        )
        self.inference = InferenceService(self.parts)
        self._stop_metrics: Callable[[], None] = lambda: None
        metrics.describe(backend.facts)
        metrics.watch(backend.engine, backend.residency, backend.merging)
        if backend.engine_pid is not None:
            metrics.watch_process(backend.engine_pid)
        metrics.registry.register(self.rollout.collector(config.tracked_adapters))
        if config.router_metrics:
            asked = AskedRefs()
            self._targets.note_asked(asked)
            metrics.registry.register(
                RouterCollector(
                    metrics,
                    backend.engine,
                    backend.residency,
                    asked,
                    backend.facts.adapter_memory_bytes,
                )
            )

    def interceptors(self) -> tuple[Around, ...]:
        """What every call of gRPC's kind is wrapped in; the outermost first."""
        traced = () if self.tracing is None else (TracingInterceptor(self.tracing),)
        access = () if self.guard is None else (AccessInterceptor(self.guard),)
        return (
            RequestIdInterceptor(),
            ErrorInterceptor(),
            MetricsInterceptor(self.metrics),
            *traced,
            *access,
            DecodingInterceptor(),
        )

    def attach(self) -> None:
        """Take the running event loop for the one that brings the calls; before ``begin``."""
        loop = asyncio.get_running_loop()
        self.calls.attach(loop)
        self.metrics.registry.register(LoopCollector(loop, self.calls))
        self.metrics.on_failure = lambda error: loop.call_soon_threadsafe(self._on_failure, error)

    def begin(self) -> None:
        """Begin to step, and to follow the aliases."""
        self.backend.engine.start()
        self.rollout.start()

    def open_metrics(self) -> int:
        """Answer /metrics on a port of its own; return the port.

        Raises:
            ConfigError: the port is in use, or the host is not this machine's.
        """
        config = self.config
        try:
            server, thread = start_http_server(
                config.metrics_port, addr=config.host, registry=self.metrics.registry
            )
        except OSError as error:
            raise port_error("--metrics-port", config.host, config.metrics_port) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop_metrics = stop
        return int(server.server_port)

    async def end_calls(self) -> None:
        """Refuse new calls and end those that run; idempotent."""
        self.calls.refuse("the server has stopped; try another replica.")
        self.calls.fail_all(Unavailable("the server stops; try another replica."))
        self.rollout.feed.close()
        await self.calls.wait_idle(LAST_WORDS_S)

    async def close(self) -> None:
        """Stop engine, threads and /metrics, and send the last spans; idempotent. Calls have been ended before."""
        await self.rollout.stop()
        await asyncio.to_thread(self.backend.close)
        for part in (self._targets, self._prompts, self.guard):
            if part is not None:
                part.close()
        await asyncio.to_thread(self._stop_metrics)
        self._stop_metrics = lambda: None
        if self.tracing is not None:
            tracing, self.tracing = self.tracing, None
            await asyncio.to_thread(tracing.close)

    def _on_failure(self, error: BaseException) -> None:
        self.failure = error
        self.calls.refuse("the engine failed; try another replica.")
        self.calls.fail_all(EngineFailed("the engine failed"))
        self.on_failure()


def bracketed(host: str) -> str:
    """Return a host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def port_error(name: str, host: str, port: int) -> ConfigError:
    """Return what to raise when ``--name`` cannot be listened on."""
    return ConfigError(
        f"cannot listen on '{bracketed(host)}:{port}': the port is in use, not allowed, or the host "
        f"is not this machine's. Choose another {name}, or 0 for a free one."
    )
