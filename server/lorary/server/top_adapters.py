"""Per-adapter counters for the busiest adapters only; the others share ``adapter="_other"``.

A thousand adapters with series of their own cost a second per scrape. Each adapter that was really
served is tallied in memory; the busiest ``limit`` have series. When one without series outgrows the
quietest one with series by far, they swap: the series of the quiet one end, those of the busy one
begin at zero. Every counter only ever grows, so rates stay right.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Counter

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

OTHER = "_other"
# How many times busier a newcomer must be; keeps two similar adapters from swapping for ever.
SWAP_FACTOR = 2


@dataclass(frozen=True, slots=True)
class _Series:
    """The bound children of one adapter."""

    requests: Counter
    prompt_tokens: Counter
    generated_tokens: Counter


class TopAdapters:
    """Counters of requests and tokens by adapter, at most ``limit`` + 1 label values.

    Args:
        limit: adapters with series of their own.
        registry: where the two counters are declared.
    """

    def __init__(self, limit: int, registry: CollectorRegistry) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._tally: Tally[str] = Tally()
        self._requests = Counter(
            "lorary_adapter_requests",
            "Answers that ended, by adapter.",
            ["adapter"],
            registry=registry,
        )
        self._tokens = Counter(
            "lorary_adapter_tokens", "Tokens, by adapter.", ["adapter", "kind"], registry=registry
        )
        self._series: dict[str, _Series] = {}
        self._other = self._bind(OTHER)

    def add(self, adapter: str, *, prompt_tokens: int, generated_tokens: int) -> None:
        """Count one answer of ``adapter``, which must be a name that the registry knows."""
        with self._lock:
            self._tally[adapter] += 1
            series = self._series.get(adapter) or self._try_track(adapter) or self._other
        series.requests.inc()
        series.prompt_tokens.inc(prompt_tokens)
        series.generated_tokens.inc(generated_tokens)

    def _try_track(self, adapter: str) -> _Series | None:
        """Give ``adapter`` series of its own if there is room, or if it deserves another's."""
        if len(self._series) >= self.limit:
            quietest = min(self._series, key=self._tally.__getitem__, default=None)
            if quietest is None or self._tally[adapter] <= SWAP_FACTOR * self._tally[quietest]:
                return None
            self._unbind(quietest)
        series = self._series[adapter] = self._bind(adapter)
        return series

    def _bind(self, adapter: str) -> _Series:
        return _Series(
            self._requests.labels(adapter),
            self._tokens.labels(adapter, "prompt"),
            self._tokens.labels(adapter, "generation"),
        )

    def _unbind(self, adapter: str) -> None:
        del self._series[adapter]
        self._requests.remove(adapter)
        self._tokens.remove(adapter, "prompt")
        self._tokens.remove(adapter, "generation")
