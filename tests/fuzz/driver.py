"""Sends inputs side by side while the next ones are made, and keeps what was wrong."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import grpc.aio

from tests.fuzz.grpc_door import GrpcInput

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

    from tests.fuzz.http_door import HttpInput
    from tests.processes import ServerProcess

SIDE_BY_SIDE = 12
ENOUGH = 25
"""Faults after which nothing further is sent: the server may be gone."""


class Driver:
    """Runs an event loop on a thread of its own; use it as a context manager.

    Attributes:
        sent: inputs that went through each door.
        faults: what was wrong, with the input.
    """

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fuzz")
        self._places = threading.BoundedSemaphore(SIDE_BY_SIDE)
        self._channel: grpc.aio.Channel | None = None
        self.sent: Counter[str] = Counter()
        self.faults: list[str] = []

    def __enter__(self) -> Driver:
        self._thread.start()
        self._do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def send(self, one: GrpcInput | HttpInput) -> None:
        """Begin to send an input as soon as there is a place."""
        if len(self.faults) >= ENOUGH:
            return
        self._places.acquire()
        self.sent[one.door] += 1
        asyncio.run_coroutine_threadsafe(self._send(one), self._loop)

    def drain(self) -> None:
        """Wait until all that was sent has ended."""
        for _ in range(SIDE_BY_SIDE):
            self._places.acquire()
        for _ in range(SIDE_BY_SIDE):
            self._places.release()

    async def _open(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._server.address)

    async def _close(self) -> None:
        assert self._channel is not None
        await self._channel.close(None)

    async def _send(self, one: GrpcInput | HttpInput) -> None:
        try:
            wrong = await self._wrong(one)
        except Exception as error:  # noqa: BLE001 - an answer that cannot even be read is a fault, too
            wrong = f"{type(error).__name__}: {error}"
        finally:
            self._places.release()
        if wrong:
            self.faults.append(f"{one.door}: {wrong}\n    {str(one)[:3000]}")

    async def _wrong(self, one: GrpcInput | HttpInput) -> str:
        assert self._channel is not None
        if isinstance(one, GrpcInput):
            return await one.faults(self._channel)
        http = urlsplit(str(self._server.http_url)).netloc
        host, _, port = (http if one.port == "http" else self._server.address).rpartition(":")
        return await one.faults(host, int(port))

    def _do(self, work: Coroutine[None, None, None]) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        done.result()
