"""How often each version answered, and when last; bounded, by digest."""

from __future__ import annotations

import time
from collections import OrderedDict

MAX_DIGESTS = 16_384


class Traffic:
    """Answers by digest; the least recently used are forgotten. On the event loop."""

    def __init__(self) -> None:
        self._served: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count(self, digest: str) -> None:
        """Count one answered call."""
        number = self._served.pop(digest, (0, 0.0))[0]
        self._served[digest] = (number + 1, time.time())
        if len(self._served) > MAX_DIGESTS:
            self._served.popitem(last=False)

    def of(self, digest: str) -> tuple[int, float]:
        """Return how many calls a version answered, and when last (seconds since 1970; 0: never)."""
        return self._served.get(digest, (0, 0.0))
