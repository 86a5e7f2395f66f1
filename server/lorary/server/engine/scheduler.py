"""Who runs in the next step; pure Python, no torch.

Decode rows go first: every sequence that has its prompt behind it advances by one token in every
step. What is left of the step's token budget goes to prompts, cut into chunks, so that a long prompt
never stalls the streams.

A free place goes to whose turn it is (``fair_queue``: priority, then who has been served least, then
the earliest deadline), and only when the adapter is on the device: a load in progress delays nobody
else. Where the adapters of one step are capped, one that would be too many waits, and others with a
running adapter go before it.

**Nobody starves.** Each ``TURN``-th place, and the very next one after a while without, is owed to the
line that has waited longest, once it has been passed over for ``patience_s``. So when G lines are that
old, each of them has a place after at most TURN x G more, whatever the priorities and counters. While a place
is owed,

- nobody enters before the owed one when ``admit`` has no room for it, as small ones would for ever;
- when the cap keeps it out, the adapter that is nearest to done gets no new places until it has left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import DeadlineExceeded, Overloaded
from lorary.server.engine.fair_queue import ANSWER_COST, PATIENCE_S, PROMPT_COST, FairQueue
from lorary.server.engine.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lorary.server.adapters.merged import MergedWeights
    from lorary.server.engine.sequence import Sequence

TURN = 4
"""One place of so many may be owed: the rest stay with priorities and fairness."""
HOPELESS = 4.0
"""A first token is hopeless when a step would have to be this many times faster than they are."""
RETRY_S = (0.1, 60.0)
"""The least and the most that a refused caller is told to wait."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One step's work: sequences that decode, and prompts with how many tokens of them to read.

    With ``is_above`` all of it begins behind the shared layers.
    """

    decode: tuple[Sequence, ...]
    prefill: tuple[tuple[Sequence, int], ...]
    is_above: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.decode and not self.prefill

    @property
    def merged(self) -> MergedWeights | None:
        """The merged weights that all of it runs on, None for the base's; asked of one part."""
        first = self.decode[0] if self.decode else self.prefill[0][0]
        return first.merged

    def by_start(self) -> tuple[Scheduled, ...]:
        """Return the work in parts that begin at the same layer; all of it, where that is the first.

        Tokens whose shared layers are computed already go first: what stands behind them in the same prompt
        reads their keys and values in the layers behind.
        """
        above = tuple(
            (s, min(count, s.num_below - s.num_computed))
            for s, count in self.prefill
            if s.num_computed < s.num_below
        )
        if not above:
            return (self,)
        done = dict(above)
        rest = ((s, count - done.get(s, 0)) for s, count in self.prefill)
        whole = Scheduled(self.decode, tuple((s, count) for s, count in rest if count))
        first = Scheduled((), above, is_above=True)
        return (first,) if whole.is_empty else (first, whole)

    def by_weights(self) -> tuple[Scheduled, ...]:
        """Return the work in parts that run on the same weights; all of it, where it is on the base's.

        Everybody advances in every step, whichever weights are hot: a step then is a pass for each part.
        """
        found: dict[int, tuple[list[Sequence], list[tuple[Sequence, int]]]] = {}
        for sequence in self.decode:
            found.setdefault(id(sequence.merged), ([], []))[0].append(sequence)
        for sequence, count in self.prefill:
            found.setdefault(id(sequence.merged), ([], []))[1].append((sequence, count))
        if len(found) == 1:
            return (self,)
        return tuple(Scheduled(tuple(decode), tuple(rest)) for decode, rest in found.values())


class Scheduler:
    """Two queues: who waits for a place, and who has one.

    Invariant: a sequence is in exactly one of the two from ``add`` to ``remove``.

    Args:
        max_batch: places.
        prefill_budget: most prompt tokens in one step.
        prefill_beside: most of them in a step in which answers go on; 0: as many.
        max_waiting: most sequences in the queue.
        max_adapters: most adapters that running sequences may have between them, the bare base not
            counted; 0: as many as there are places.
        patience_s: seconds after which a line that was passed over is owed a place.
        clock: the seconds of ``Request.deadline_s``.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        prefill_budget: int,
        prefill_beside: int = 0,
        max_waiting: int,
        max_adapters: int = 0,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_batch = max_batch
        self.prefill_budget = prefill_budget
        self.prefill_beside = prefill_beside
        self.max_waiting = max_waiting
        self.max_adapters = max_adapters
        self.waiting = FairQueue(patience_s=patience_s, clock=clock)
        self.running: list[Sequence] = []
        self._clock = clock
        self._pace = Pace()
        # Places given since the last step was noted, and since the last owed one.
        self._num_given = 0
        self._num_since_owed = TURN - 1
        # Refused callers that nobody has made room for yet.
        self._num_refused = 0

    @property
    def num_waiting_for_adapter(self) -> int:
        """How many wait for a load rather than for a place."""
        return self.waiting.num_loading

    def check_room(self, count: int, num_pending: int = 0) -> None:
        """Raise unless ``count`` more may wait beside ``num_pending`` not yet added.

        Raises:
            Overloaded: the queue is full. Its ``retry_after_s`` is when, at the pace of the last steps,
                there will be room for this caller after all others that were refused before it.
        """
        length = len(self.waiting) + num_pending
        if length + count > self.max_waiting:
            # Bounded, for who asks again and again is counted each time, and some never come back.
            self._num_refused = min(self._num_refused + count, self.max_waiting)
            needed = length + self._num_refused - self.max_waiting
            low, high = RETRY_S
            raise Overloaded(
                f"{length} requests are waiting and this server queues at most "
                f"{self.max_waiting}; retry later, or raise --max-waiting",
                retry_after_s=min(high, max(low, self._pace.seconds_for(needed))),
            )

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue."""
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.waiting.end(sequence)
        else:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's place away; it waits in front of its line."""
        self.running.remove(sequence)
        self.waiting.put_back(sequence)

    def victim(self) -> Sequence:
        """Return who should lose its place first: the lowest priority, then the latest arrival.

        Asked only while somebody runs.
        """
        # Of several that came at once, the last to get a place.
        latest = reversed(self.running)
        return min(latest, key=lambda s: (s.request.priority, -s.arrived_ns))

    def everyone(self) -> Iterable[Sequence]:
        """Iterate over a copy of all sequences, running ones first."""
        return [*self.running, *self.waiting]

    def note_step(self, seconds: float) -> None:
        """Learn how long the step took that ``next_batch`` had picked."""
        self._pace.note(seconds, self._num_given)
        self._num_given = 0

    def late(self) -> dict[Sequence, DeadlineExceeded]:
        """Return who should be dropped for its deadline, and why.

        That is who is past it, and who waits and could not have its first token in time even if it were
        given the next place: while others run, a step would have to be ``HOPELESS`` times faster than
        the last few hundred were on average. Nothing else is held against it: an answer may end early,
        and a prompt's beginning may be in the cache.
        """
        now = self._clock()
        late: dict[Sequence, DeadlineExceeded] = {}
        for sequence in self.running:
            deadline = sequence.request.deadline_s
            if deadline is not None and deadline <= now:
                late[sequence] = _past(sequence)
        needed_s = self._pace.step_s / HOPELESS if self.running else 0.0
        for sequence in self.waiting:
            deadline = sequence.request.deadline_s
            if deadline is None or deadline - now > needed_s:
                continue
            left_s = deadline - now
            if left_s <= 0:
                late[sequence] = _past(sequence)
            elif not sequence.num_generated:
                late[sequence] = DeadlineExceeded(
                    f"the deadline is {left_s * 1000:.3g} ms away and a step takes "
                    f"{self._pace.step_s * 1000:.3g} ms here, so the first token would be late; the "
                    "request was dropped before any work. Allow more time"
                )
        return late

    def next_batch(self, admit: Callable[[Sequence], bool]) -> Scheduled:
        """Pick the next step's work.

        ``admit`` is called for each sequence that could have a place, and returns False when it should
        rather wait: it keeps its turn.
        """
        decode = [sequence for sequence in self.running if not sequence.is_prefilling]
        for sequence in decode:
            self.waiting.charge(sequence, ANSWER_COST)
        budget = self.prefill_budget
        if decode and self.prefill_beside:
            budget = min(budget, self.prefill_beside)
        prefill: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            if sequence.is_prefilling:
                budget = self._take_chunk(sequence, budget, prefill)
        while budget > 0 and len(self.running) < self.max_batch:
            taken = self._choose(admit)
            if taken is None:
                break
            self.waiting.take(taken)
            self.running.append(taken)
            self._num_given += 1
            self._num_refused = max(0, self._num_refused - 1)
            budget = self._take_chunk(taken, budget, prefill)
        return Scheduled(tuple(decode), tuple(prefill))

    def _choose(self, admit: Callable[[Sequence], bool]) -> Sequence | None:
        """Return who gets the next place, admitted."""
        adapters = self._running_adapters()
        draining = ""
        owed = self.waiting.passed_over() if self._num_since_owed >= TURN - 1 else None
        if owed is not None:
            if self._fits(owed, adapters):
                if admit(owed):
                    self._num_since_owed = 0
                    return owed
                if self.running:
                    return None
            else:
                draining = self._nearest_to_done()
        for head in self.waiting.heads():
            is_drained = draining and head.request.lease.digest == draining
            if not is_drained and self._fits(head, adapters) and admit(head):
                self._num_since_owed += 1
                return head
        return None

    def _running_adapters(self) -> set[str]:
        """Return the digests that the cap counts; none where nothing is capped."""
        if not self.max_adapters:
            return set()
        return {s.request.lease.digest for s in self.running} - {""}

    def _fits(self, sequence: Sequence, adapters: set[str]) -> bool:
        """Whether the cap allows the sequence's adapter beside those that run."""
        digest = sequence.request.lease.digest
        is_new = digest != "" and digest not in adapters
        return not (is_new and 0 < self.max_adapters <= len(adapters))

    def _nearest_to_done(self) -> str:
        """Return the running adapter whose sequences will all have ended after the fewest tokens."""
        tokens: dict[str, int] = {}
        for sequence in self.running:
            digest = sequence.request.lease.digest
            left = sequence.num_prompt + sequence.request.sampling.max_tokens
            left -= sequence.num_computed
            tokens[digest] = max(tokens.get(digest, 0), left)
        tokens.pop("", None)
        return min(tokens, key=lambda digest: tokens[digest])

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


def _past(sequence: Sequence) -> DeadlineExceeded:
    if sequence.num_computed or sequence.num_generated:
        return DeadlineExceeded(
            f"the deadline passed after {sequence.num_generated} tokens; allow more time or ask for "
            "fewer"
        )
    return DeadlineExceeded(
        "the deadline passed in the queue, before any work; allow more time, or send less at once"
    )
