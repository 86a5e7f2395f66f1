"""Which adapter generates most of the tokens: counted over windows of some seconds, one after the other."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens by digest; the bare base's is empty."""

    tokens: Counter[str]

    @property
    def total(self) -> int:
        """Of all adapters, and of the base."""
        return self.tokens.total()

    def share(self, digest: str) -> float:
        """Return a digest's part of all tokens; 0 of none."""
        return self.tokens[digest] / max(1, self.total)

    @property
    def hottest(self) -> str:
        """The adapter with the most tokens; empty when there was none."""
        return max((d for d in self.tokens if d), key=self.tokens.__getitem__, default="")


class TrafficShare:
    """Counts generated tokens; one thread's alone."""

    def __init__(
        self, *, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._clock = clock
        self._since = clock()
        self._tokens: Counter[str] = Counter()

    def note(self, digests: Iterable[str]) -> Window | None:
        """Count a token for each of these; return the window if it ends with them."""
        self._tokens.update(digests)
        now = self._clock()
        if now - self._since < self._window_s:
            return None
        ended, self._tokens, self._since = Window(self._tokens), Counter(), now
        return ended
