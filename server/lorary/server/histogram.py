"""A histogram that one thread writes, for what is observed in every step or for every token.

prometheus_client's own takes a lock for each number and walks along its bounds: six times as long, and four of
them were 5 % of what a step cost in Python (docs/log.md).
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric


class OneWriterHistogram:
    """How often values were at most each of some bounds; written by one thread, read by any.

    Args:
        name: the metric's.
        documentation: its help text.
        buckets: bounds, ascending; what is larger than all of them is counted, too.
        registry: takes it.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        """Count one value; on the writing thread only."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """Yield the counts so far, each bucket with those below it."""
        names = map(floatToGoString, (*self._bounds, float("inf")))
        counts = accumulate(self._counts.copy())
        yield HistogramMetricFamily(
            self._name,
            self._documentation,
            buckets=list(zip(names, counts, strict=True)),
            sum_value=self._sum,
        )
