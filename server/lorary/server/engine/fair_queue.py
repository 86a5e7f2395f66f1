"""Who waits, fair across adapters; pure Python, no torch.

Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models",
arXiv:2401.00588): every adapter's counter grows with the work done for it, and the next place goes to
the waiting adapter whose counter is the smallest. An adapter that begins to wait is lifted to the
smallest counter among those that wait already, so that idling earns no credit. Within one adapter:
first come, first served. With one adapter alone it is a plain queue.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorary.server.engine.sequence import Sequence

PROMPT_COST = 1
"""Of one prompt token that is read."""
ANSWER_COST = 2
"""Of one generated token: it takes a row of its own (the paper's weights)."""


class FairQueue:
    """Sequences that wait for a place, by the digest of their adapter.

    Invariant: an adapter has a queue while at least one sequence of it waits, and a counter while it
    waits or has work running.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._counters: dict[str, int] = {}
        self._num_running: dict[str, int] = {}
        # What an adapter starts from that comes when nobody waits: the last one served then.
        self._floor = 0
        # Counted, not summed: other threads ask.
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """Iterate over a copy, adapter by adapter."""
        return iter([s for queue in self._queues.values() for s in queue])

    @property
    def has_ready(self) -> bool:
        """Whether the adapter of any sequence is on the device."""
        return any(queue[0].request.lease.is_ready for queue in self._queues.values())

    @property
    def num_loading(self) -> int:
        """How many wait for their adapter rather than for a place."""
        queues = self._queues.values()
        return sum(len(queue) for queue in queues if not queue[0].request.lease.is_ready)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence behind the others of its adapter."""
        key = sequence.request.lease.digest
        queue = self._queues.get(key)
        if queue is None:
            waiting = [self._counters[k] for k in self._queues]
            least = min(waiting) if waiting else self._floor
            self._counters[key] = max(self._counters.get(key, 0), least)
            queue = self._queues[key] = deque()
        queue.append(sequence)
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that waits."""
        key = sequence.request.lease.digest
        self._queues[key].remove(sequence)
        self._length -= 1
        self._drop_if_idle(key)

    def take(self, accept: Callable[[Sequence], bool]) -> Sequence | None:
        """Take the sequence whose turn it is among those whose adapter's next one is accepted.

        ``accept`` is asked about one sequence of each adapter at most; what it refuses keeps its turn.
        """
        for key in sorted(self._queues, key=self._counters.__getitem__):
            sequence = self._queues[key][0]
            if accept(sequence):
                self._queues[key].popleft()
                self._length -= 1
                self._num_running[key] = self._num_running.get(key, 0) + 1
                self._floor = max(self._floor, self._counters[key])
                self._drop_if_idle(key)
                return sequence
        return None

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Count work done for a sequence that was taken."""
        self._counters[sequence.request.lease.digest] += cost

    def put_back(self, sequence: Sequence) -> None:
        """Put a sequence that was taken in front of the others of its adapter; it keeps its turn."""
        key = sequence.request.lease.digest
        self._queues.setdefault(key, deque()).appendleft(sequence)
        self._length += 1
        self._num_running[key] -= 1
        if not self._num_running[key]:
            del self._num_running[key]

    def end(self, sequence: Sequence) -> None:
        """A sequence that was taken has left."""
        key = sequence.request.lease.digest
        self._num_running[key] -= 1
        if not self._num_running[key]:
            del self._num_running[key]
        self._drop_if_idle(key)

    def _drop_if_idle(self, key: str) -> None:
        """Forget queue and counter when nothing needs them: memory is by what is active."""
        if key in self._queues and not self._queues[key]:
            del self._queues[key]
        if key not in self._queues and key not in self._num_running:
            del self._counters[key]
