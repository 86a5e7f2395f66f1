"""A way to a server that can fall silent: no bytes, no FIN, not even the system's acknowledgements."""

from __future__ import annotations

import asyncio
import ctypes
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_SO_ATTACH_FILTER = 26
_DROP_ALL = bytes((0x06, 0, 0, 0, 0, 0, 0, 0))
"""One instruction of classic BPF: ``ret #0``, keep nothing of a packet."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class BlackHole:
    """Forwards connections until it swallows them (Linux).

    Attributes:
        port: where callers connect to, on loopback.
    """

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._to_server: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @classmethod
    @asynccontextmanager
    async def before(cls, address: str) -> AsyncIterator[Self]:
        """Stand before the server at ``host:port``."""
        host, _, port = address.rpartition(":")
        hole = cls(host, int(port))
        hole._server = await asyncio.start_server(hole._accept, "127.0.0.1", 0)
        hole.port = hole._server.sockets[0].getsockname()[1]
        try:
            yield hole
        finally:
            hole._server.close()
            for task in hole._tasks:
                task.cancel()
            await asyncio.gather(*hole._tasks, return_exceptions=True)

    def swallow(self) -> None:
        """From now on nothing passes, what the server sends is acknowledged by nobody, and nobody is let in."""
        self._is_open.clear()
        assert self._server is not None, "it is entered first"
        self._server.close()
        program = _Program(len(_DROP_ALL) // 8, _DROP_ALL)
        for one in self._to_server:
            one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        self._to_server.append(far_writer.get_extra_info("socket"))
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._forward(source, sink))
            self._tasks.add(task)

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    await self._is_open.wait()
                    sink.write(data)
        finally:
            sink.close()
