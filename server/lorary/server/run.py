"""The life of a server process: check, build, announce, serve, stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorary.server import interpreter, logs
from lorary.server.app import Server, check_files_of, check_ports_free, handle_signals
from lorary.server.build import build_backend
from lorary.server.calls import Calls
from lorary.server.core import Core
from lorary.server.metrics import ServerMetrics
from lorary.server.startup import Startup
from lorary.server.tracing.collector import check_tracing, open_tracing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorary.server.app import Addresses
    from lorary.server.build import Backend
    from lorary.server.config import ServerConfig

log = logging.getLogger("lorary.server")

EXIT_INTERRUPTED = 130


def run(config: ServerConfig, *, as_json: bool) -> int:
    """Run a server until it is told to stop; return the process' exit code.

    Args:
        config: how it runs.
        as_json: print the ready line as JSON.

    Raises:
        LoraryError: it cannot start, or its engine broke.
    """
    logs.configure(config.log_format, config.log_level)
    started = time.monotonic()
    check_files_of(config)
    check_ports_free(config)
    check_tracing(config)
    interpreter.share_fairly()
    metrics = ServerMetrics(num_tracked_adapters=config.tracked_adapters)
    # Every call in flight is an answer that runs or waits, or is about to.
    calls = Calls(config.max_batch + config.max_waiting, config.stream_frames)
    has_bars = config.log_format == "human" and sys.stderr.isatty() and not config.engine_process
    with Startup(bars=has_bars) as startup:
        backend = build_backend(config, deliver=calls.deliver, observer=metrics, startup=startup)
    interpreter.forget_what_stays()
    log.info("built in %.1f s", time.monotonic() - started)
    return asyncio.run(_serve(config, backend, calls, metrics, as_json=as_json))


async def _serve(
    config: ServerConfig, backend: Backend, calls: Calls, metrics: ServerMetrics, *, as_json: bool
) -> int:
    server = Server(Core(config, backend, calls, metrics, open_tracing(config, backend.facts)))
    try:
        addresses = await server.start()
        handle_signals(server)
    except BaseException:
        await server.stop()
        raise
    facts = ready_facts(addresses, backend)
    with _ready_file(config.ready_file, facts):
        print(json.dumps(facts) if as_json else ready_line(facts), flush=True)  # noqa: T201
        await server.serve_until_stopped()
    log.info("stopped")
    return EXIT_INTERRUPTED if server.was_hurried else 0


def ready_facts(addresses: Addresses, backend: Backend) -> dict[str, Any]:
    """Return what a script needs to know of a server that is ready."""
    facts = backend.facts
    return {
        "event": "ready",
        "address": addresses.grpc,
        "metrics": addresses.metrics,
        "http": addresses.http,
        "base": facts.base,
        "fingerprint": facts.base_fingerprint,
        "quantization": facts.quantization,
        "device": facts.device,
        "version": facts.version,
        "pid": os.getpid(),
        "engine_pid": backend.engine_pid or os.getpid(),
    }


def ready_line(facts: dict[str, Any]) -> str:
    """Return the same for people, in one line that begins with ``ready:``."""
    return (
        f"ready: {facts['address']} serves {facts['base']} ({facts['quantization']}, "
        f"{facts['device']}, {facts['fingerprint'][:19]}), metrics at {facts['metrics']}"
        + (f", OpenAI's API at {facts['http']}/v1" if facts["http"] else "")
    )


@contextmanager
def _ready_file(path: Path | None, facts: dict[str, Any]) -> Iterator[None]:
    """Keep ``path`` there, complete, while the server is ready."""
    if path is None:
        yield
        return
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_text(json.dumps(facts) + "\n")
    partial.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
