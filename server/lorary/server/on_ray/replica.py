"""One replica: the same core as ``lorary serve``, with Serve in place of its doors."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray import serve

from lorary.errors import EngineFailed
from lorary.server import interpreter, logs
from lorary.server.app import check_files_of
from lorary.server.build import build_backend
from lorary.server.calls import Calls
from lorary.server.core import Core
from lorary.server.interceptors import add_trailing
from lorary.server.metrics import ServerMetrics
from lorary.server.on_ray.announcer import Announcer
from lorary.server.on_ray.replica_call import ReplicaCall
from lorary.server.tracing.collector import check_tracing, open_tracing
from lorary.v1 import inference_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from google.protobuf.descriptor import MethodDescriptor
    from ray.serve.grpc_util import RayServegRPCContext

    from lorary.server.config import ServerConfig

log = logging.getLogger("lorary.server")

REPLICA_KEY = "lorary-replica"
"""Trailing metadata: which replica answered."""
SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]


class Replica:
    """A deployment whose methods are those of ``lorary.v1.Inference`` (added below, from its descriptor).

    Args:
        config: how the server in it runs.
        num_announced: adapters that Serve remembers to be here.

    Raises:
        LoraryError: as ``lorary serve`` at its start.
    """

    def __init__(self, config: ServerConfig, num_announced: int) -> None:
        logs.configure(config.log_format, config.log_level)
        check_files_of(config)
        check_tracing(config)
        interpreter.share_fairly()
        metrics = ServerMetrics(num_tracked_adapters=config.tracked_adapters)
        calls = Calls(config.max_batch + config.max_waiting, config.stream_frames)
        backend = build_backend(config, deliver=calls.deliver, observer=metrics)
        interpreter.forget_what_stays()
        self._core = Core(config, backend, calls, metrics, open_tracing(config, backend.facts))
        self._around = self._core.interceptors()
        self._tag = serve.get_replica_context().replica_tag

        async def announce(name: str) -> str:
            return name

        told = serve.multiplexed(announce, max_num_models_per_replica=num_announced)
        self._announcer = Announcer(told, num_announced)
        self._core.attach()
        self._core.begin()
        port = self._core.open_metrics()
        log.info("replica %s serves '%s', metrics on port %d", self._tag, backend.facts.base, port)

    def check_health(self) -> None:
        """Tell Serve whether to replace this replica.

        Raises:
            EngineFailed: it should.
        """
        if self._core.failure is not None:
            raise EngineFailed("the engine failed; this replica must be replaced.")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what ``autoscaling.by_waiting`` reads: answers that run, and that wait, and for what."""
        engine, last = self._core.backend.engine, self._core.metrics.last_step
        waiting = engine.num_waiting
        for_adapter = min(waiting, last.num_waiting_for_adapter if last else 0)
        return {
            "running": float(engine.num_running),
            "waiting_for_place": float(waiting - for_adapter),
            "waiting_for_adapter": float(for_adapter),
        }

    async def __del__(self) -> None:
        """Stop everything; Serve calls it when running calls have ended, or their time is up."""
        core: Core | None = getattr(self, "_core", None)
        if core is not None:
            await core.end_calls()
            await core.close()

    def _call(self, given: RayServegRPCContext) -> tuple[ReplicaCall, list[str]]:
        """Return the call, and the list in which its adapter will stand; it is in use from then on."""
        used: list[str] = []

        def on_adapter(name: str) -> None:
            used.append(name)
            self._announcer.enter(name)

        call = ReplicaCall(given, on_adapter)
        add_trailing(call, REPLICA_KEY, self._tag)
        return call, used

    def _leave(self, used: list[str]) -> None:
        for name in used:
            self._announcer.leave(name)

    async def _unary(self, method: str, request: Any, given: RayServegRPCContext) -> Any:
        call, used = self._call(given)
        behaviour = getattr(self._core.inference, method)
        try:
            return await call.unary(_path(method), behaviour, request, self._around)
        finally:
            self._leave(used)

    async def _stream(
        self, method: str, request: Any, given: RayServegRPCContext
    ) -> AsyncGenerator[Any, None]:
        call, used = self._call(given)
        behaviour = getattr(self._core.inference, method)
        try:
            stream = call.stream(_path(method), behaviour, request, self._around)
            async with aclosing(stream) as messages:
                async for message in messages:
                    yield message
        finally:
            self._leave(used)


def _path(method: str) -> str:
    return f"/{SERVICE.full_name}/{method}"


def _entry(method: MethodDescriptor) -> Callable[..., Any]:
    """Return what Serve calls for a method: it looks for these names, and for ``grpc_context``."""
    name = method.name
    if method.server_streaming:

        async def stream(
            self: Replica, request: Any, grpc_context: Any
        ) -> AsyncGenerator[Any, None]:
            async with aclosing(self._stream(name, request, grpc_context)) as messages:
                async for message in messages:
                    yield message

        return stream

    async def unary(self: Replica, request: Any, grpc_context: Any) -> Any:
        return await self._unary(name, request, grpc_context)

    return unary


for _method in SERVICE.methods:
    setattr(Replica, _method.name, _entry(_method))
