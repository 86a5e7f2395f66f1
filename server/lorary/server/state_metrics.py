"""Gauges that mirror a state: read when Prometheus asks, so they are never stale."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from lorary.server.calls import Calls
    from lorary.server.metrics import ServerMetrics
    from lorary.server.ports import EngineLike, MergingLike, ResidencyLike


class StateCollector:
    """Gauges that are read, not written: what runs, what waits, what is resident."""

    def __init__(
        self,
        metrics: ServerMetrics,
        engine: EngineLike,
        residency: ResidencyLike,
        merging: MergingLike | None = None,
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._residency = residency
        self._merging = merging

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as they are now."""
        yield from self._requests()
        yield from self._residents()

    def _requests(self) -> Iterator[Metric]:
        running, waiting = self._engine.num_running, self._engine.num_waiting
        last = self._metrics.last_step
        for_adapter = min(waiting, last.num_waiting_for_adapter if last else 0)
        yield _gauge("lorary_requests_running", "Answers that share the steps now.", running)
        family = GaugeMetricFamily(
            "lorary_requests_waiting", "Answers that wait, and for what.", labels=["reason"]
        )
        family.add_metric(["capacity"], waiting - for_adapter)
        family.add_metric(["adapter_loading"], for_adapter)
        yield family
        # The last step's figure is from before its answers ended; with none left, nothing is held.
        used = last.kv_tokens_used if last and running else 0
        yield _gauge("lorary_kv_tokens_used", "Tokens held in the KV cache.", used)
        capacity = last.kv_tokens_total if last else 0
        yield _gauge("lorary_kv_tokens_capacity", "Tokens the KV cache can hold.", capacity)

    def _residents(self) -> Iterator[Metric]:
        residents = self._residency.snapshot()
        states = GaugeMetricFamily(
            "lorary_adapters", "Adapters on the device, coming, or going.", labels=["state"]
        )
        for state in ("resident", "loading", "unloading"):
            states.add_metric([state], sum(r.state == state for r in residents))
        yield states
        yield _gauge(
            "lorary_adapters_quarantined",
            "Versions that failed their checks and are refused.",
            len(self._residency.quarantined()),
        )
        num_bytes = sum(r.device_bytes for r in residents)
        yield _gauge("lorary_adapter_bytes", "Device bytes that adapters take.", num_bytes)
        merged = None if self._merging is None else self._merging.merged()
        yield _gauge(
            "lorary_merged_bytes",
            "Bytes that the merged copy of an adapter's layers takes.",
            0 if merged is None else merged.num_bytes,
        )
        host = self._residency.host_stats()
        yield _gauge(
            "lorary_host_adapters", "Copies of adapters in host memory.", host.num_adapters
        )
        yield _gauge("lorary_host_adapter_bytes", "Bytes that these copies take.", host.num_bytes)
        lookups = CounterMetricFamily(
            "lorary_host_adapter_lookups",
            "Loads that looked for a copy in host memory.",
            labels=["result"],
        )
        lookups.add_metric(["hit"], host.num_hits)
        lookups.add_metric(["miss"], host.num_misses)
        yield lookups
        info = GaugeMetricFamily(
            "lorary_adapter_info",
            "1 for every version on the device, at most as many as have series of their own.",
            labels=["adapter", "version", "digest"],
        )
        shown = [r for r in residents if r.state == "resident"][: self._metrics.adapters.limit]
        for resident in shown:
            info.add_metric([resident.name, str(resident.version), resident.digest], 1)
        yield info


class LoopCollector:
    """What runs on the event loop that brings the calls, and how their answers leave it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, calls: Calls) -> None:
        self._loop = loop
        self._calls = calls

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as they are now; on whichever thread Prometheus is answered."""
        count = len(asyncio.all_tasks(self._loop))
        yield _gauge("lorary_event_loop_tasks", "Tasks of the server's event loop.", count)
        yield _gauge(
            "lorary_steps_per_frame",
            "Of how many steps a stream's frame carries the tokens (--stream-frames).",
            self._calls.steps_per_frame,
        )


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family
