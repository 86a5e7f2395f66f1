"""What could not be loaded a moment ago is refused at once, so that asking in a loop costs nothing."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.errors import LoraryError

MAX_REMEMBERED = 1024
"""Failures kept at most; the oldest are forgotten first."""


class RecentFailures:
    """Errors by digest, each for a while. Not thread-safe: the residency's lock guards it.

    Args:
        ttl_s: how long; 0 remembers nothing.
        clock: seconds.
    """

    def __init__(self, ttl_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._failures: OrderedDict[str, tuple[float, LoraryError]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failures)

    def note(self, digest: str, error: LoraryError) -> None:
        """Remember why a digest could not be loaded just now."""
        now = self._clock()
        self._failures[digest] = (now, error)
        self._failures.move_to_end(digest)
        while self._failures:
            oldest, (failed_s, _) = next(iter(self._failures.items()))
            if len(self._failures) <= MAX_REMEMBERED and now - failed_s < self._ttl_s:
                break
            del self._failures[oldest]

    def forget(self, digest: str) -> None:
        """Let the next one who asks try again."""
        self._failures.pop(digest, None)

    def recall(self, digest: str) -> LoraryError | None:
        """Return the error of a digest that failed less than ``ttl_s`` ago, saying when to ask again.

        A new one each time: an exception that is raised again and again would collect tracebacks.
        """
        found = self._failures.get(digest)
        if found is None:
            return None
        failed_s, first = found
        left_s = failed_s + self._ttl_s - self._clock()
        if left_s <= 0:
            del self._failures[digest]
            return None
        error = copy.copy(first).with_traceback(None)
        error.args = (
            f"{first} This was found {self._clock() - failed_s:.1f} s ago; it is looked at again in "
            f"{left_s:.1f} s.",
            *first.args[1:],
        )
        error.retry_after_s = left_s
        return error
