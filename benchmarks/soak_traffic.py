"""What happens to a server that is soaked, and what is read of it meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.library import Member, fill
from benchmarks.service_parts import resident_bytes, stream_grpc, stream_http
from lorary.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness.server_process import ServerProcess
    from lorary.bases import Base
    from lorary.registry import Registry

ALIAS = "live"
_TASKS = "lorary_event_loop_tasks"
_GIVEN_UP = 0.1
"""Share of the answers whose callers go away after the first token."""
_THROUGH_HTTP = 4
"""Every so-manieth caller comes through the HTTP door."""
_ANSWER_TOKENS = (4, 16, 48)
_LEAST_SAMPLES = 4
_WINDOWS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a soak goes.

    Attributes:
        minutes: how long.
        callers: answers at once.
        sampled_s: seconds between two looks at the server.
        published_s: seconds between two new versions.
    """

    minutes: float
    callers: int
    sampled_s: float = 5.0
    published_s: float = 15.0


@dataclass(slots=True)
class Library:
    """Adapters of one rank behind an alias each, of which new versions can be published."""

    registry: Registry
    base: Base
    names: Sequence[str]
    rank: int
    scratch: Path
    _seeds: itertools.count[int] = field(default_factory=itertools.count)

    def fill(self) -> None:
        """Publish every adapter once."""
        for name in self.names:
            self.publish(name)

    def publish(self, name: str) -> None:
        """Push a version with numbers of its own, and promote it."""
        member = Member(name, self.rank, next(self._seeds))
        fill(self.registry, self.base, [member], self.scratch, aliases=(ALIAS,))


def soak(
    server: ServerProcess, library: Library, prompts: Sequence[Sequence[int]], pace: Pace
) -> dict[str, Any]:
    """Keep answers going; return the series of what must stay flat.

    Raises:
        grpc.aio.AioRpcError, RuntimeError: an answer failed.
    """
    return asyncio.run(_Soak(server, library, prompts, pace).run())


class _Soak:
    def __init__(
        self,
        server: ServerProcess,
        library: Library,
        prompts: Sequence[Sequence[int]],
        pace: Pace,
    ) -> None:
        self._server = server
        self._library = library
        self._prompts = prompts
        self._pace = pace
        self._is_over = asyncio.Event()
        self._counts = {"answers": 0, "given_up": 0, "published": 0}
        self._series: list[dict[str, float]] = []

    async def run(self) -> dict[str, Any]:
        async with (
            grpc.aio.insecure_channel(self._server.address) as channel,
            # One that fails ends the others.
            asyncio.TaskGroup() as together,
        ):
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            for number in range(self._pace.callers):
                together.create_task(self._call(number, stub))
            together.create_task(self._publish())
            together.create_task(self._watch())
        return {"kind": "soak", **self._counts, "series": self._series}

    async def _call(self, number: int, stub: Any) -> None:
        drawn = random.Random(number)
        weights = [1 / (k + 1) for k in range(len(self._library.names))]
        is_http = number % _THROUGH_HTTP == _THROUGH_HTTP - 1
        while not self._is_over.is_set():
            (name,) = drawn.choices(self._library.names, weights)
            ref, ids = f"{name}@{ALIAS}", drawn.choice(self._prompts)
            tokens = drawn.choice(_ANSWER_TOKENS)
            is_given_up = drawn.random() < _GIVEN_UP
            if is_http:
                url = str(self._server.facts["http"])
                await stream_http(url, ids, tokens, ref, is_given_up=is_given_up)
            else:
                await stream_grpc(stub, ids, tokens, ref, is_given_up=is_given_up)
            self._counts["given_up" if is_given_up else "answers"] += 1

    async def _publish(self) -> None:
        for name in itertools.cycle(self._library.names):
            try:
                await asyncio.wait_for(self._is_over.wait(), self._pace.published_s)
            except TimeoutError:
                await asyncio.to_thread(self._library.publish, name)
                self._counts["published"] += 1
            else:
                return

    async def _watch(self) -> None:
        started = time.monotonic()
        # Where the machine stands still there are fewer samples, too few for a line.
        while (
            time.monotonic() < started + 60 * self._pace.minutes
            or len(self._series) < _LEAST_SAMPLES
        ):
            now = {"at_s": round(time.monotonic() - started, 1)}
            self._series.append(now | await asyncio.to_thread(holdings, self._server))
            await asyncio.sleep(self._pace.sampled_s)
        self._is_over.set()


def holdings(server: ServerProcess) -> dict[str, float]:
    """Return what a server holds now: megabytes of resident memory, threads, open files, tasks."""
    pid = int(server.facts["pid"])
    folder = Path(f"/proc/{pid}")
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    return {
        "memory_mb": round(resident_bytes(pid) / 1e6, 1),
        "threads": len(list((folder / "task").iterdir())),
        "files": len(list((folder / "fd").iterdir())),
        "tasks": _value(text, _TASKS),
    }


def _value(text: str, name: str) -> float:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                return float(sample.value)
    raise LookupError(f"the server tells no {name}")


def lows(series: Sequence[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """Return the least of each of ``_WINDOWS`` parts of the last two thirds, behind its time in hours.

    In the first third caches fill. Who is there just now has connections and buffers and goes again: what is
    never given back lifts the least, too.
    """
    late = series[len(series) // 3 :]
    parts = np.array_split(np.arange(len(late)), min(_WINDOWS, len(late)))
    least = [min((late[k] for k in part), key=lambda sample: sample[key]) for part in parts]
    return [(sample["at_s"] / 3600, sample[key]) for sample in least]


def line(series: Sequence[dict[str, float]], key: str) -> tuple[float, float]:
    """Return the slope, in an hour, and the start of a straight line through ``lows``.

    It is Theil's and Sen's (Sen 1968, doi:10.1080/01621459.1968.10480934), the median of the slopes between any
    two, so that one moment at which next to nobody was there does not tilt it.
    """
    hours, least = (np.array(column) for column in zip(*lows(series, key), strict=True))
    before, after = np.triu_indices(len(hours), 1)
    slope = np.median((least[after] - least[before]) / (hours[after] - hours[before]))
    return float(slope), float(np.median(least - slope * hours))


def slopes(series: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return by how much each number of a series grows in an hour."""
    return {key: round(line(series, key)[0], 3) for key in series[0] if key != "at_s"}
