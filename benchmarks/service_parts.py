"""What the service costs beside its engine: the parts of ``service`` that are not about the two doors.

- ``streams``: 256 answers stream at once through gRPC. Counted is the processor time of all threads of the server
  but the engine's (by their names), for each token that a client received; with ``--engine-process``, of both
  processes, and beside it that of the doors' alone and of the engine's thread.
- ``unary``: one ``Classify`` at a time. The overhead of a call is what its client waited less what the receipt
  says that the engine took: queue, load and prefill.
- ``idle``: a thousand streams that say nothing (``grpc.health.v1.Health/Watch``), over ten connections; the
  server's resident memory before and with them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc.aio
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

ENGINE = "engine"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CONNECTIONS = 10


def _cpu_s(pid: int) -> tuple[float, float]:
    """Return the processor seconds so far of a process' living threads: of all but the engine's, and of that."""
    total, engine = 0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            line = (task / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The name may hold spaces and parentheses; fields follow the last one.
        name, _, fields = line.partition("(")[2].rpartition(")")
        ticks = sum(map(int, fields.split()[11:13]))
        if name == ENGINE:
            engine += ticks
        else:
            total += ticks
    return total / _TICKS_PER_S, engine / _TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Return a process' resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


async def stream_all(address: str, prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """Stream every prompt's answer at once through one channel; return how many tokens came."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        return sum(await asyncio.gather(*(stream_grpc(stub, ids, tokens) for ids in prompts)))


async def stream_grpc(
    stub: Any, ids: Sequence[int], tokens: int, adapter: str = "", *, is_given_up: bool = False
) -> int:
    """Stream one answer through gRPC; return how many tokens came.

    Args:
        stub: of the service, by a channel of the caller's.
        ids: of the prompt.
        tokens: of the answer.
        adapter: a ref; the bare base where it is empty.
        is_given_up: cancel the call after the first event.

    Raises:
        grpc.aio.AioRpcError: the call failed.
    """
    sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
    prompt = pb.Input(token_ids=pb.TokenIds(ids=ids))
    call = stub.Generate(pb.GenerateRequest(adapter=adapter, input=prompt, sampling=sampling))
    if is_given_up:
        first = await call.read()
        call.cancel()
        return len(first.chunk.token_ids)
    return sum([len(event.chunk.token_ids) async for event in call])


async def stream_http(
    url: str, ids: Sequence[int], tokens: int, model: str = "", *, is_given_up: bool = False
) -> int:
    """Stream one answer through the HTTP door, by a connection of its own; return how many tokens came.

    Args:
        url: the door's.
        ids: of the prompt.
        tokens: of the answer.
        model: a ref; the bare base where it is empty.
        is_given_up: close the connection after the first event.

    Raises:
        RuntimeError: the stream did not end as one does.
    """
    place = urlsplit(url)
    body = {"prompt": list(ids), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    sent = json.dumps({**body, "model": model} if model else body).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(sent) + sent
        )
        events = []
        async for line in reader:
            if line.startswith(b"data: "):
                events.append(line)
                if is_given_up:
                    return 1
    finally:
        writer.close()
        await writer.wait_closed()
    if not events or b"[DONE]" not in events[-1]:
        raise RuntimeError(f"a stream over HTTP ended with {events[-1:]}")
    return int(json.loads(events[-2].removeprefix(b"data: "))["usage"]["completion_tokens"])


def streams(
    address: str,
    pid: int,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    engine_pid: int | None = None,
) -> dict[str, Any]:
    """Stream every prompt's answer at once; return µs of the service's processor time for a token.

    Args:
        address: the server's.
        pid: its process.
        prompts: token ids, a stream for each.
        tokens: of each answer.
        engine_pid: the process that its engine is in, if that is another one.
    """
    pids = {pid, pid if engine_pid is None else engine_pid}
    before = {one: _cpu_s(one) for one in pids}
    started = time.monotonic()
    count = asyncio.run(stream_all(address, prompts, tokens))
    seconds = time.monotonic() - started
    used = {one: np.subtract(_cpu_s(one), before[one]) * 1e6 / count for one in pids}
    beside, engine = np.sum(list(used.values()), axis=0)
    return {
        "kind": "streams",
        "streams": len(prompts),
        "tokens": count,
        "tokens_per_s": round(count / seconds, 1),
        "service_cpu_us_per_token": round(float(beside), 1),
        "door_cpu_us_per_token": round(float(used[pid][0]), 1),
        "engine_cpu_us_per_token": round(float(engine), 1),
    }


def unary(address: str, prompts: Sequence[Sequence[int]], calls: int) -> dict[str, Any]:
    """Classify one prompt after the other; return percentiles of what a call takes beside the engine."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        beside_ms, whole_ms = [], []
        for ids in itertools.islice(itertools.cycle(prompts), calls):
            request = pb.ClassifyRequest(
                input=pb.Input(token_ids=pb.TokenIds(ids=ids)), labels=["yes", "no"]
            )
            started = time.perf_counter_ns()
            timings = stub.Classify(request).receipt.timings
            whole = time.perf_counter_ns() - started
            engine = timings.queue_ns + timings.prefill_ns + timings.decode_ns
            whole_ms.append(whole / 1e6)
            beside_ms.append((whole - engine) / 1e6)
    return {
        "kind": "unary",
        "calls": calls,
        "beside_engine_ms": _percentiles(beside_ms),
        "whole_ms": _percentiles(whole_ms),
    }


def idle(address: str, pid: int, count: int) -> dict[str, Any]:
    """Hold ``count`` streams open; return the megabytes that the server grew by."""

    async def hold() -> tuple[int, int]:
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(
                        address, options=[("grpc.use_local_subchannel_pool", 1)]
                    )
                )
                for _ in range(_CONNECTIONS)
            ]
            stubs: list[Any] = [health_pb2_grpc.HealthStub(channel) for channel in channels]
            for stub in stubs:
                await stub.Check(health_pb2.HealthCheckRequest())
            before = resident_bytes(pid)
            calls = [
                stub.Watch(health_pb2.HealthCheckRequest())
                for stub in itertools.islice(itertools.cycle(stubs), count)
            ]
            # The first message of each says that the server has it.
            await asyncio.gather(*(call.read() for call in calls))
            await asyncio.sleep(1.0)
            after = resident_bytes(pid)
            for call in calls:
                call.cancel()
            return before, after

    before, after = asyncio.run(hold())
    return {"kind": "idle", "streams": count, "added_mb": round((after - before) / 1e6, 2)}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 3) for p in (50, 95, 99)}
