"""Lorary as applications meet it: a real server process, called by its asyncio client."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from benchmarks.harness.server_process import ServerProcess
from benchmarks.harness.threads import all_cores, plain_environment
from benchmarks.workload import Call, Contender, Trace
from lorary.client import AsyncClient, Chunk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class LoraryServer(Contender):
    """``lorary serve``; client and server share the cores, as they do on a laptop."""

    name = "lorary (grpc)"

    def __init__(self, arguments: Sequence[str], scratch: Path) -> None:
        with all_cores():
            self._process = ServerProcess(
                arguments, scratch / "server", environment=plain_environment()
            )
        self._loop = asyncio.Runner()
        self._client = self._loop.run(self._connect())

    def prepare(self, adapters: Sequence[str]) -> None:
        """Load adapters and wait for them."""

        async def load() -> None:
            for name in adapters:
                await self._client.load_adapter(name)

        self._loop.run(load())

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Let ``concurrency`` callers share the calls; each sends one after the other."""
        waiting = iter(enumerate(calls))
        traces = [Trace(0.0) for _ in calls]

        async def everybody() -> None:
            callers = (self._ask(waiting, new_tokens, traces) for _ in range(concurrency))
            await asyncio.gather(*callers)

        self._loop.run(everybody())
        return traces

    def close(self) -> None:
        """Stop client and server."""
        self._loop.run(self._client.close())
        self._loop.close()
        self._process.stop()

    async def _connect(self) -> AsyncClient:
        return AsyncClient(self._process.address, timeout_s=600.0)

    async def _ask(
        self, waiting: Iterator[tuple[int, Call]], new_tokens: int, traces: list[Trace]
    ) -> None:
        for index, call in waiting:
            trace = traces[index] = Trace(time.perf_counter())
            async for event in self._client.stream(
                token_ids=call.prompt_ids,
                adapter=call.adapter or "",
                max_tokens=new_tokens,
                ignore_eos=True,
            ):
                if isinstance(event, Chunk):
                    trace.token_ids += event.token_ids
                    trace.token_s += [time.perf_counter()] * len(event.token_ids)
