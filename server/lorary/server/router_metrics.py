"""What an endpoint picker reads of a server, under vLLM's names (``--router-metrics``).

The pickers of llm-d and of the Gateway API Inference Extension score servers by a few of vLLM's gauges, whose
names they have as defaults and whose labels are fixed. With these they route to a server of ours as it is.

``vllm:lora_requests_info`` lists adapters in labels and has the time as its value: of several series the newest counts.
vLLM lists the adapters of running requests; we list those on the device, which is what a router wants to know, and in
one series, where vLLM leaves one behind for every set that there has been.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily

from lorary.server.engine.blocks import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from lorary.server.metrics import ServerMetrics
    from lorary.server.ports import EngineLike, ResidencyLike, ResidentLike

MAX_ASKED = 4096


class AskedRefs:
    """What callers wrote of late, and the versions it stood for; on any thread.

    A picker compares the ``model`` of a call, to the letter, with the names that a server lists, and a caller may write
    ``sentiment``, ``sentiment@prod`` or ``sentiment@3`` for one version.

    Args:
        most: refs that are remembered; what was asked longest ago goes first.
    """

    def __init__(self, most: int = MAX_ASKED) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._digests: OrderedDict[str, str] = OrderedDict()

    def note(self, ref: str, digest: str) -> None:
        """Remember that ``ref`` was asked for and stood for ``digest``."""
        with self._lock:
            self._digests[ref] = digest
            self._digests.move_to_end(ref)
            if len(self._digests) > self._most:
                self._digests.popitem(last=False)

    def by_digest(self) -> dict[str, list[str]]:
        """Return the refs of each version."""
        with self._lock:
            asked = list(self._digests.items())
        refs: dict[str, list[str]] = {}
        for ref, digest in asked:
            refs.setdefault(digest, []).append(ref)
        return refs


class RouterCollector:
    """vLLM's gauges of what runs, waits and is resident, read when Prometheus asks.

    Args:
        metrics: where the last step's figures are.
        engine: what runs and waits.
        residency: what is on the device.
        asked: what callers call it.
        adapter_memory: bytes that adapters may take on the device.
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        engine: EngineLike,
        residency: ResidencyLike,
        asked: AskedRefs,
        adapter_memory: int,
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._residency = residency
        self._asked = asked
        self._adapter_memory = adapter_memory

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as they are now."""
        running, last = self._engine.num_running, self._metrics.last_step
        yield _gauge("vllm:num_requests_running", "Answers that share the steps now.", running)
        yield _gauge("vllm:num_requests_waiting", "Answers that wait.", self._engine.num_waiting)
        used = last.kv_tokens_used / last.kv_tokens_total if last and running else 0.0
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", used)
        if last is not None:
            blocks = {
                "block_size": str(BLOCK),
                "num_gpu_blocks": str(last.kv_tokens_total // BLOCK),
            }
            yield _gauge("vllm:cache_config_info", "Blocks of the KV cache.", 1, blocks)
        yield _gauge(
            "vllm:lora_requests_info",
            "Adapters on the device and on their way to it; the value is the time.",
            time.time(),
            self._adapters(),
        )

    def _adapters(self) -> dict[str, str]:
        residents, refs = self._residency.snapshot(), self._asked.by_digest()

        def named(state: str) -> list[str]:
            return [name for r in residents if r.state == state for name in _names(r, refs)]

        resident, coming = named("resident"), named("loading")
        # A picker takes this less the names in both lists for the adapters that there is still room for.
        most = len(resident) + len(coming) + self._num_that_fit(residents)
        return {
            "max_lora": str(most),
            "running_lora_adapters": ",".join(resident),
            "waiting_lora_adapters": ",".join(coming),
        }

    def _num_that_fit(self, residents: Sequence[ResidentLike]) -> int:
        """How many more adapters of the usual size there is memory for; one, when there is none to tell the size."""
        sizes = [r.device_bytes for r in residents if r.device_bytes]
        if not sizes:
            return 1
        taken = sum(sizes)
        return max(0, self._adapter_memory - taken) * len(sizes) // taken


def _names(resident: ResidentLike, refs: dict[str, list[str]]) -> list[str]:
    """What callers write for a version, its number always among it."""
    by_number = f"{resident.name}@{resident.version}"
    return sorted({by_number, *refs.get(resident.digest, ())})


def _gauge(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    labels = labels or {}
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
