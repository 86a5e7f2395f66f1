"""An HTTP server inside the event loop that serves everything else."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext
from typing import TYPE_CHECKING

import uvicorn

from lorary.server.tls import server_context

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from starlette.types import ASGIApp

    from lorary.server.tls import TlsFiles

# Every call has been ended before the listener stops; this is for what gRPC does not know of.
LAST_WORDS_S = 2
START_S = 10.0
IDLE_S = 30
"""Seconds that a connection may stay open without a request."""


class Listener:
    """Serves one application on one socket.

    Args:
        app: the application.
        tls: files for HTTPS, which are followed; None speaks plain HTTP.

    Raises:
        ConfigError: the files cannot be used.
    """

    def __init__(self, app: ASGIApp, tls: TlsFiles | None = None) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            # Ours go on as they are.
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        config.load()
        if tls is not None:
            config.ssl = server_context(tls)
        self._server = _Embedded(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port that was taken.

        Raises:
            OSError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.create_server((host, port), family=found[0][0], backlog=1024)
        taken = int(listening.getsockname()[1])
        self._task = loop.create_task(self._server.serve(sockets=[listening]))
        async with asyncio.timeout(START_S):
            while not self._server.started:
                if self._task.done():
                    await self._task
                await asyncio.sleep(0)
        return taken

    async def stop(self) -> None:
        """Close the socket and every connection; idempotent."""
        if self._task is None:
            return
        self._server.should_exit = True
        await self._task
        self._task = None


class _Embedded(uvicorn.Server):
    """Leaves signals to the process, which drains first."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Capture none."""
        return nullcontext()
