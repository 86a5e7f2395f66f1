"""Who waits, in which order; pure Python, no torch.

Sequences wait in *lines*, one for every adapter and priority. The next place goes to

1. the highest priority; among equals to
2. the adapter that has been served least at this priority: virtual token counters (Sheng et al. 2024,
   "Fairness in Serving Large Language Models", arXiv:2401.00588). A counter grows with the work done,
   and a line that begins to wait is lifted to the smallest counter of those that wait at its priority,
   so that idling earns no credit; among equals to
3. the head whose deadline is the earliest.

Who must run on merged weights has a line of its own, too: it may wait for them while others of the same
adapter need not. A composition of adapters has a line of its own, for it may have to wait for a part of it, but no counter
of its own: what is done for it counts for the adapter that leads it (``Request.account``). Else a caller
would have a new share with every new weight.

Within a line the earliest deadline goes first. What has none counts as due ``DUE_S`` after it came, and so
does what has a later one: with equal time-outs, and with none, a line is first come, first served, and
nothing is ever overtaken by what comes more than ``DUE_S`` after it.

Priorities starve, and so do counters when new adapters never end. ``passed_over`` therefore names the line
that has waited longest for a place, once that is longer than the queue's patience; the scheduler gives
it one place in every few (see there for the bound).
"""

from __future__ import annotations

import itertools
import math
import time
from bisect import insort
from dataclasses import dataclass, field
from heapq import heapify, heappop
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorary.server.engine.sequence import Sequence

    # The priority, the digest of the adapter that pays, and the digest of what is to be there.
    Key = tuple[int, str, str]

PROMPT_COST = 1
"""Of one prompt token that is read."""
ANSWER_COST = 2
"""Of one generated token: it takes a row of its own (the paper's weights)."""
DUE_S = 30.0
"""How long after its arrival a request without a nearer deadline counts as due."""
PATIENCE_S = 5.0
"""How long a line may be passed over, unless the server is told otherwise."""


@dataclass(slots=True)
class _Line:
    """Who waits for one adapter with one priority.

    Attributes:
        since: when it began to wait, or got its last place, or was last seen waiting for its adapter.
        ranked: by when each is due, then by arrival. Never empty outside of a method.
    """

    since: float
    ranked: list[tuple[tuple[float, int], Sequence]] = field(default_factory=list)

    @property
    def head(self) -> Sequence:
        return self.ranked[0][1]

    @property
    def is_ready(self) -> bool:
        return self.head.request.lease.is_ready


@dataclass(slots=True)
class Account:
    """What one adapter has been given at one priority.

    Attributes:
        counter: of virtual tokens.
        num_lines: lines that it pays for.
        num_running: sequences that were taken and have not left.
    """

    counter: int = 0
    num_lines: int = 0
    num_running: int = 0


class FairQueue:
    """Sequences that wait for a place.

    Invariant: an adapter has a line at a priority while at least one sequence of it waits there, and an
    account while anything that it pays for waits or runs there.

    Args:
        patience_s: seconds after which a line without a place counts as passed over.
        clock: the seconds of ``Request.deadline_s``.
    """

    def __init__(
        self, *, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._lines: dict[Key, _Line] = {}
        # By priority and the digest of the adapter that pays.
        self._accounts: dict[tuple[int, str], Account] = {}
        # By priority: what an adapter starts from that comes when nobody waits there, which is the
        # counter of the last one served.
        self._floors: dict[int, int] = {}
        self._arrivals = itertools.count()
        # Downwards: who is put back last stands first.
        self._returns = itertools.count(-1, -1)
        # Counted, not summed: other threads ask.
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over a copy, line by line."""
        return iter([s for line in self._lines.values() for _, s in line.ranked])

    @property
    def has_ready(self) -> bool:
        """Whether the adapter of any sequence is on the device."""
        return any(line.is_ready for line in self._lines.values())

    @property
    def num_loading(self) -> int:
        """How many wait for their adapter rather than for a place."""
        return sum(len(line.ranked) for line in self._lines.values() if not line.is_ready)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into its line, behind whatever is due before it."""
        now = self._clock()
        deadline = sequence.request.deadline_s
        due = now + DUE_S if deadline is None else min(deadline, now + DUE_S)
        key = _key(sequence)
        account = self._accounts.setdefault(key[:2], Account())
        if not account.num_lines:
            waiting = [
                a.counter for (p, _), a in self._accounts.items() if p == key[0] and a.num_lines
            ]
            least = min(waiting) if waiting else self._floors.get(key[0], 0)
            account.counter = max(account.counter, least)
        self._insert(key, (due, next(self._arrivals)), sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Put a sequence that was taken in front of its line, as if it had never been taken.

        It keeps its turn, and its counter is not lifted: what was done for it stays counted.
        """
        self._insert(_key(sequence), (-math.inf, next(self._returns)), sequence)
        self.end(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that waits."""
        key = _key(sequence)
        ranked = self._lines[key].ranked
        del ranked[next(i for i, (_, other) in enumerate(ranked) if other is sequence)]
        self._length -= 1
        self._drop_if_idle(key)

    def heads(self) -> Iterator[Sequence]:
        """Iterate over the first sequence of every line whose adapter is there, by turn.

        One of them may be taken, which ends the iteration's use.
        """
        # A heap: most often the first is taken. Ranks are unique, so lines are never compared.
        turns = [
            (-key[0], self._accounts[key[:2]].counter, line.ranked[0][0], line)
            for key, line in self._lines.items()
        ]
        heapify(turns)
        while turns:
            line = heappop(turns)[-1]
            if line.is_ready:
                yield line.head

    def passed_over(self) -> Sequence | None:
        """Return the head of the line that has waited longest, if that is longer than the patience.

        A line whose adapter is still being loaded does not wait for a place.
        """
        now = self._clock()
        longest: _Line | None = None
        for line in self._lines.values():
            if now - line.since < self._patience_s:
                continue
            if not line.is_ready:
                line.since = now
            elif longest is None or line.since < longest.since:
                longest = line
        return None if longest is None else longest.head

    def take(self, sequence: Sequence) -> None:
        """Take a sequence out, which is the head of its line: it has a place from now on."""
        key = _key(sequence)
        line = self._lines[key]
        assert line.head is sequence
        del line.ranked[0]
        line.since = self._clock()
        self._length -= 1
        account = sequence.account = self._accounts[key[:2]]
        account.num_running += 1
        self._floors[key[0]] = max(self._floors.get(key[0], 0), account.counter)
        self._drop_if_idle(key)

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Count work done for a sequence that was taken."""
        account = sequence.account
        assert account is not None, "nothing is done for who waits"
        account.counter += cost

    def end(self, sequence: Sequence) -> None:
        """A sequence that was taken has left."""
        account, sequence.account = sequence.account, None
        assert account is not None, "who waits has nothing to leave"
        account.num_running -= 1
        self._forget_if_idle(_key(sequence)[:2])

    def _insert(self, key: Key, rank: tuple[float, int], sequence: Sequence) -> None:
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._clock())
            self._accounts[key[:2]].num_lines += 1
        insort(line.ranked, (rank, sequence), key=itemgetter(0))
        self._length += 1

    def _drop_if_idle(self, key: Key) -> None:
        """Forget line and account when nothing needs them: memory is by what is active."""
        if not self._lines[key].ranked:
            del self._lines[key]
            self._accounts[key[:2]].num_lines -= 1
        self._forget_if_idle(key[:2])

    def _forget_if_idle(self, key: tuple[int, str]) -> None:
        account = self._accounts[key]
        if not account.num_lines and not account.num_running:
            del self._accounts[key]


def _key(sequence: Sequence) -> Key:
    request = sequence.request
    digest = request.lease.digest
    needed = f"{digest}/merged" if request.execution == "merged" else digest
    return request.priority, request.account or digest, needed
