"""Where the time of a call goes: functions are wrapped, and each second belongs to the innermost."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stopwatch:
    """Exclusive seconds per part; ``take`` reads and clears them. One thread only."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = {}
        self._replaced: list[tuple[Any, str, Any, bool]] = []

    def wrap(self, owner: Any, attribute: str, part: str) -> None:
        """Replace a function by one that is timed as ``part``, until ``unwrap``."""
        function = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(part):
                return function(*arguments, **options)

        self._replaced.append((owner, attribute, function, attribute in vars(owner)))
        setattr(owner, attribute, timed)

    def unwrap(self) -> None:
        """Put every function back."""
        for owner, attribute, function, was_own in reversed(self._replaced):
            if was_own:
                setattr(owner, attribute, function)
            else:
                delattr(owner, attribute)
        self._replaced.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Give the block's time to ``name``, but for what inner parts take."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return seconds per part since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
