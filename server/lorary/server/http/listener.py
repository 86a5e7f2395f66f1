"""An HTTP server inside the event loop that serves everything else."""

from __future__ import annotations

import asyncio
import math
import socket
from contextlib import nullcontext
from typing import TYPE_CHECKING

import uvicorn

from lorary.server.http.connection import REQUEST_S, Connection
from lorary.server.tls import server_context

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from starlette.types import ASGIApp

    from lorary.server.tls import TlsFiles

# Every call has been ended before the listener stops; this is for what gRPC does not know of.
LAST_WORDS_S = 2
START_S = 10.0
PROBED_AFTER_S, PROBED_EVERY_S = 20, 5
"""The system asks a connection that was silent for so long whether its peer is there, and asks again."""


class Listener:
    """Serves one application on one socket.

    Args:
        app: the application.
        tls: files for HTTPS, which are followed; None speaks plain HTTP.
        stall_s: a peer that takes nothing of what it was sent for so long, or is gone without a word, has its
            connection cut by the system (Linux; gRPC does so by itself).

    Raises:
        ConfigError: the files cannot be used.
    """

    def __init__(self, app: ASGIApp, tls: TlsFiles | None = None, *, stall_s: float) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            # Ours go on as they are.
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            # Connection waits for requests, and no longer.
            timeout_keep_alive=math.ceil(REQUEST_S),
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        config.load()
        if tls is not None:
            config.ssl = server_context(tls)
        self._server = _Embedded(config)
        self._stall_ms = round(stall_s * 1000)
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port that was taken.

        Raises:
            OSError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.create_server((host, port), family=found[0][0], backlog=1024)
        # What is accepted has these from the socket that listens.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._stall_ms)
        if hasattr(socket, "TCP_KEEPIDLE"):
            # A peer that is gone while its answer is waited for would otherwise be noticed by nobody.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBED_AFTER_S)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBED_EVERY_S)
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
