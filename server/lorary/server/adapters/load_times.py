"""How long it takes to bring an adapter from where it lies, learned from the loads so far."""

from __future__ import annotations

import threading
from typing import Literal

Source = Literal["host", "registry"]
"""Where a load comes from: a copy in host memory, or the registry's files."""

_KEPT = 0.9
"""What an observation still counts when the next one has come."""
_FIRST: dict[Source, float] = {"host": 2e-10, "registry": 4e-9}
"""Seconds per byte before anything was loaded: 5 GB/s and 0.25 GB/s."""


class _Line:
    """Fits ``seconds = overhead + pace · bytes`` by least squares, older points counting less."""

    def __init__(self, pace: float) -> None:
        self._pace = pace
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, x: float, y: float) -> None:
        sums = (self._n, self._x, self._y, self._xx, self._xy)
        new = (1.0, x, y, x * x, x * y)
        self._n, self._x, self._y, self._xx, self._xy = (
            _KEPT * old + add for old, add in zip(sums, new, strict=True)
        )

    def at(self, x: float) -> float:
        if not self._n:
            return self._pace * x
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        # Sizes that hardly differ say nothing of what a byte costs: all of it is the pace, then.
        if spread <= 1e-4 * mean_x * mean_x:
            return mean_y / mean_x * x
        pace = max(0.0, (self._xy / self._n - mean_x * mean_y) / spread)
        overhead = mean_y - pace * mean_x
        return mean_y / mean_x * x if overhead < 0 else overhead + pace * x


class LoadTimes:
    """Estimates seconds per source and size. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines = {source: _Line(pace) for source, pace in _FIRST.items()}

    def note(self, source: Source, num_bytes: int, seconds: float) -> None:
        """Learn from a load of ``num_bytes`` > 0 that took ``seconds``."""
        with self._lock:
            self._lines[source].note(float(num_bytes), seconds)

    def seconds(self, source: Source, num_bytes: int) -> float:
        """Return how long a load of ``num_bytes`` > 0 will take; not negative."""
        with self._lock:
            return self._lines[source].at(float(num_bytes))
