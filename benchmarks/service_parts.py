"""What the service costs beside its engine: the parts of ``service`` that are not about the two doors.

- ``streams``: 256 answers stream at once through gRPC. Counted is the processor time of all threads of the server
  but the engine's (by their names), for each token that a client received; with ``--engine-process``, of both
  processes, and beside it that of the doors' alone and of the engine's thread.
- ``unary``: one ``Classify`` at a time. The overhead of a call is what its client waited less what the receipt
  says that the engine took: queue, load and prefill.
- ``idle``: a thousand streams that say nothing (``grpc.health.v1.Health/Watch``), over ten connections; the
  server's resident memory before and with them.
- ``soak``: answers over more adapters than fit, some cancelled in the middle, for ``minutes``; memory, threads and
  open files of the server all along, and the slope of a straight line through the last two thirds of each.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_SAMPLED_EVERY_S = 5.0
_LEAST_SAMPLES = 4
_CANCELLED = 0.1
"""Share of the soak's answers that are given up after their first token."""


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

        async def one(ids: Sequence[int]) -> int:
            sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
            request = pb.GenerateRequest(
                input=pb.Input(token_ids=pb.TokenIds(ids=ids)), sampling=sampling
            )
            return sum([len(e.chunk.token_ids) async for e in stub.Generate(request)])

        return sum(await asyncio.gather(*map(one, prompts)))


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


def soak(
    address: str,
    pid: int,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str],
    *,
    minutes: float,
    concurrency: int,
) -> dict[str, Any]:
    """Keep ``concurrency`` answers going; return the series of what must stay flat, and their slopes."""
    is_over = asyncio.Event()
    counts = {"answers": 0, "cancelled": 0}
    series: list[dict[str, float]] = []

    async def work(stub: Any, number: int) -> None:
        drawn = random.Random(number)
        weights = [1 / (k + 1) for k in range(len(adapters))]
        while not is_over.is_set():
            sampling = pb.SamplingParams(max_tokens=drawn.choice((4, 16, 48)), ignore_eos=True)
            ids = pb.TokenIds(ids=drawn.choice(prompts))
            (adapter,) = drawn.choices(adapters, weights)
            call = stub.Generate(
                pb.GenerateRequest(
                    adapter=adapter, input=pb.Input(token_ids=ids), sampling=sampling
                )
            )
            if drawn.random() < _CANCELLED:
                await call.read()
                call.cancel()
                counts["cancelled"] += 1
                continue
            async for _ in call:
                pass
            counts["answers"] += 1

    async def watch() -> None:
        started = time.monotonic()
        folder = Path(f"/proc/{pid}")
        # Where the machine stands still there are fewer samples, too few for a line.
        while time.monotonic() < started + 60 * minutes or len(series) < _LEAST_SAMPLES:
            series.append(
                {
                    "at_s": round(time.monotonic() - started, 1),
                    "memory_mb": round(resident_bytes(pid) / 1e6, 1),
                    "threads": len(list((folder / "task").iterdir())),
                    "files": len(list((folder / "fd").iterdir())),
                }
            )
            await asyncio.sleep(_SAMPLED_EVERY_S)
        is_over.set()

    async def everything() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            await asyncio.gather(watch(), *(work(stub, k) for k in range(concurrency)))

    asyncio.run(everything())
    return {
        "kind": "soak",
        "minutes": minutes,
        "adapters": len(adapters),
        **counts,
        "per_hour": slopes(series),
        "series": series,
    }


def slopes(series: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return by how much each number of a series grows in an hour: least squares over its last two thirds."""
    late = series[len(series) // 3 :]
    hours = np.array([sample["at_s"] for sample in late]) / 3600
    return {
        key: round(float(np.polyfit(hours, [sample[key] for sample in late], 1)[0]), 3)
        for key in late[0]
        if key != "at_s"
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 3) for p in (50, 95, 99)}
