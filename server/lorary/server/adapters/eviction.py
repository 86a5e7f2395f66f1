"""Who must go when memory is short: what is cheap to bring back, used seldom, and long ago.

GreedyDual-Size-Frequency (Cherkasova 1998). A key's worth is

    worth = clock at its last use + uses · density        density: seconds to bring it back per byte

and the least worthy goes. The clock then jumps to the worth of whoever went, so that what was used
since is worth more than what was not: this is how it ages, without a time constant that would have to suit
the traffic. Uses count up to ``MAX_USES``: what was hot once must not stay for ever. With equal densities
and one use each it is least recently used.

Pure Python, no lock of its own, and it knows nothing of pins and holders: whoever asks names the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_USES = 32
"""Uses beyond this add nothing: a key that nobody asks for any more goes after as many rounds of evictions."""


@dataclass(slots=True)
class _Use:
    clock: float
    uses: int
    order: int


class Eviction:
    """Remembers uses, and chooses who goes."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._order = 0
        self._uses: dict[str, _Use] = {}

    def __len__(self) -> int:
        return len(self._uses)

    @property
    def clock(self) -> float:
        """The worth of the worthiest that went; never falls."""
        return self._clock

    def use(self, key: str, uses: int = 1) -> None:
        """Count uses of a key; one that was unknown is known from now on."""
        self._order += 1
        known = self._uses.get(key)
        if known is None:
            self._uses[key] = _Use(self._clock, min(uses, MAX_USES), self._order)
            return
        known.clock, known.order = self._clock, self._order
        known.uses = min(known.uses + uses, MAX_USES)

    def forget(self, key: str) -> None:
        """Know nothing of a key any more; unknown ones are ignored."""
        self._uses.pop(key, None)

    def uses(self, key: str) -> int:
        """Return how often a key was used, up to ``MAX_USES``."""
        known = self._uses.get(key)
        return 0 if known is None else known.uses

    def worth(self, key: str, density: float) -> float:
        """Return a known key's worth at this density, in seconds per byte."""
        known = self._uses[key]
        return known.clock + known.uses * density

    def victim(self, candidates: Iterable[str], density: Callable[[str], float]) -> str | None:
        """Return the least worthy of the candidates, all of them known; None when there are none.

        Of equals the least recently used. It stays known until ``evicted``.
        """
        found = [(self.worth(k, density(k)), self._uses[k].order, k) for k in candidates]
        return min(found)[2] if found else None

    def evicted(self, key: str, density: float) -> None:
        """Forget a key that made room for another; from now on uses count more than earlier ones."""
        self._clock = max(self._clock, self.worth(key, density))
        self.forget(key)

    def hottest_first(self, keys: Iterable[str], density: Callable[[str], float]) -> list[str]:
        """Return known keys, the worthiest first."""
        return sorted(keys, key=lambda k: (self.worth(k, density(k)), self._uses[k].order))[::-1]
