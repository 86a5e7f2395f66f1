"""Who runs in the next step; pure Python, no torch.

Decode rows go first: every sequence that has its prompt behind it advances by one token in every
step. What is left of the step's token budget goes to prompts, cut into chunks, so that a long prompt
never stalls the streams. A free place goes to the adapter that has been served least (``fair_queue``),
so that one with a thousand requests delays one with a single request by no more than its share; and
only when the adapter is on the device: a load in progress delays nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import Overloaded
from lorary.server.engine.fair_queue import ANSWER_COST, PROMPT_COST, FairQueue

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
        self.waiting = FairQueue()
        self.running: list[Sequence] = []

    @property
    def num_waiting_for_adapter(self) -> int:
        """How many wait for a load rather than for a place."""
        return self.waiting.num_loading

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
        """Put a sequence behind the others of its adapter."""
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.waiting.end(sequence)
        else:
            self.waiting.remove(sequence)

    def victim(self) -> Sequence:
        """Return who loses its place first when memory is short: the latest to arrive."""
        return max(self.running, key=lambda s: s.arrived_ns)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's place away; it is the next of its adapter to get one."""
        self.running.remove(sequence)
        self.waiting.put_back(sequence)

    def everyone(self) -> Iterable[Sequence]:
        """Iterate over a copy of all sequences, running ones first."""
        return [*self.running, *self.waiting]

    def next_batch(self, admit: Callable[[Sequence], bool]) -> Scheduled:
        """Pick the next step's work.

        ``admit`` is called for each sequence that could have a place, and returns False when it should
        rather wait: it keeps its turn.
        """
        decode = tuple(s for s in self.running if not s.is_prefilling)
        for sequence in decode:
            self.waiting.charge(sequence, ANSWER_COST)
        budget = self.prefill_budget
        prefill: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if sequence.is_prefilling:
                budget = self._take_chunk(sequence, budget, prefill)
        while budget > 0 and len(self.running) < self.max_batch:
            taken = self.waiting.take(lambda s: s.request.lease.is_ready and admit(s))
            if taken is None:
                break
            self.running.append(taken)
            budget = self._take_chunk(taken, budget, prefill)
        return Scheduled(decode, tuple(prefill))

    def _take_chunk(
        self, sequence: Sequence, budget: int, prefill: list[tuple[Sequence, int]]
    ) -> int:
        """Give a prompt its share of the budget; return what is left."""
        if budget <= 0:
            return 0
        count = min(sequence.num_uncomputed, budget)
        prefill.append((sequence, count))
        self.waiting.charge(sequence, PROMPT_COST * count)
        return budget - count
