"""The inference service with nothing in it: what gRPC itself takes of a unary call.

``Classify`` hands its call to another thread, which computes for a millisecond as a model does, and gives it back; the
receipt says how long that took, from the beginning of the handler on, as the server's does. No interceptor, no
tenant, no registry, no metric. What a client waits beyond the receipt is gRPC's own, on the machine of that moment.

    python -m benchmarks.harness.empty_service serve --ready-file ready.json
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import grpc.aio
import torch
import typer

from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc

STEP_S = 0.001
"""About what a step of the distant server takes beside its wait."""
LOGITS = 49152
"""Of a row; a step leaves caches full of something else."""

app = typer.Typer()


@app.callback()
def commands() -> None:
    """Let ``serve`` be said, as it is to the server."""


class EmptyService(inference_pb2_grpc.InferenceServicer):
    """Answers ``Classify`` with a receipt and nothing else; its thread is a daemon.

    Args:
        loop: that the handlers run on.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked: queue.SimpleQueue[asyncio.Future[int]] = queue.SimpleQueue()
        threading.Thread(target=self._answer, name="engine", daemon=True).start()

    async def Classify(  # noqa: N802
        self, request: pb.ClassifyRequest, context: Any
    ) -> pb.ClassifyResponse:
        """Wait for the thread."""
        arrived_ns = time.monotonic_ns()
        answered: asyncio.Future[int] = self._loop.create_future()
        self._asked.put(answered)
        done_ns = await answered
        timings = pb.Timings(prefill_ns=done_ns - arrived_ns)
        return pb.ClassifyResponse(receipt=pb.Receipt(timings=timings))

    def _answer(self) -> None:
        torch.set_num_threads(1)
        while True:
            answered = self._asked.get()
            until = time.monotonic() + STEP_S
            while time.monotonic() < until:
                torch.log_softmax(torch.zeros(1, LOGITS), -1)
            self._loop.call_soon_threadsafe(answered.set_result, time.monotonic_ns())


@app.command()
def serve(
    ready_file: Annotated[Path, typer.Option(help="Where to say the address.")],
    port: Annotated[int, typer.Option(help="0: a free one.")] = 0,
    metrics_port: Annotated[int, typer.Option(help="There are none.")] = 0,
) -> None:
    """Serve until terminated."""
    asyncio.run(_serve(ready_file, port))


async def _serve(ready_file: Path, port: int) -> None:
    server = grpc.aio.server()
    service = EmptyService(asyncio.get_running_loop())
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    partial = ready_file.with_suffix(".partial")
    partial.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    partial.rename(ready_file)
    await server.wait_for_termination()


if __name__ == "__main__":
    app()
