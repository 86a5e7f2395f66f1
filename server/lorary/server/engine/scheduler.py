"""Who runs in the next step; pure Python, no torch.

Decode rows go first: every sequence that has its prompt behind it advances by one token in every
step. What is left of the step's token budget goes to prompts, oldest first, cut into chunks, so
that a long prompt never stalls the streams. A waiting request takes a place only when its adapter
is on the device: a load in progress delays nobody else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lorary.server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One step's work: sequences that decode, and prompts with how many tokens of them to read."""

    decode: tuple[Sequence, ...]
    prefill: tuple[tuple[Sequence, int], ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.decode and not self.prefill


class Scheduler:
    """Two queues: who waits for a place, and who has one.

    Invariant: a sequence is in exactly one of the two from ``add`` to ``remove``.
    """

    def __init__(self, *, max_batch: int, prefill_budget: int, max_waiting: int) -> None:
        self.max_batch = max_batch
        self.prefill_budget = prefill_budget
        self.max_waiting = max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def num_waiting_for_adapter(self) -> int:
        """How many wait for a load rather than for a place."""
        return sum(not s.request.lease.is_ready for s in self.waiting)

    def check_room(self, count: int, num_pending: int = 0) -> None:
        """Raise unless ``count`` more may wait beside ``num_pending`` not yet added.

        Raises:
            Overloaded: the queue is full.
        """
        length = len(self.waiting) + num_pending
        if length + count > self.max_waiting:
            raise Overloaded(
                f"{length} requests are waiting and this server queues at most "
                f"{self.max_waiting}; retry later, or raise --max-waiting",
                retry_after_s=1.0 + length / max(1, self.max_batch),
            )

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def everyone(self) -> Iterable[Sequence]:
        """Iterate over a copy of all sequences, running ones first."""
        return [*self.running, *self.waiting]

    def next_batch(self, admit: Callable[[Sequence], bool]) -> Scheduled:
        """Pick the next step's work.

        ``admit`` is called for each sequence that could have a place, and returns False when it should
        rather wait: it keeps its turn.
        """
        decode = tuple(s for s in self.running if not s.is_prefilling)
        budget = self.prefill_budget
        prefill: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if sequence.is_prefilling:
                budget = self._take_chunk(sequence, budget, prefill)
        # A sequence that may not start now stays where it is: its turn is not lost.
        skipped: list[Sequence] = []
        num_put_off = 0
        while self.waiting and budget > 0 and len(self.running) < self.max_batch:
            sequence = self.waiting.popleft()
            if not sequence.request.lease.is_ready:
                skipped.append(sequence)
                continue
            if not admit(sequence):
                skipped.append(sequence)
                num_put_off += 1
                # Asking costs a comparison of prompts: not of a whole long queue in every step.
                if num_put_off >= self.max_batch:
                    break
                continue
            self.running.append(sequence)
            budget = self._take_chunk(sequence, budget, prefill)
        self.waiting.extendleft(reversed(skipped))
        return Scheduled(decode, tuple(prefill))

    def _take_chunk(
        self, sequence: Sequence, budget: int, prefill: list[tuple[Sequence, int]]
    ) -> int:
        """Give a prompt its share of the budget; return what is left."""
        if budget <= 0:
            return 0
        count = min(sequence.num_prompt - sequence.num_computed, budget)
        prefill.append((sequence, count))
        return budget - count
