"""A server on paper: a scheduler, a clock, memory for keys and values, and calls that come and go.

What is checked after every step is what must hold whatever happens; what a test asks beyond it, it reads
from ``places`` (who was given one, in order) and ``ends`` (how everyone ended).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorary.server.engine.fair_queue import ANSWER_COST, DUE_S, PROMPT_COST
from lorary.server.engine.scheduler import Scheduler
from tests.server.on_paper import Clock, FakeLease, make, perform

if TYPE_CHECKING:
    from lorary.server.engine.sequence import Sequence

Line = tuple[int, str]
"""Who waits behind whom: a priority, and an adapter's digest."""


@dataclass(frozen=True)
class Call:
    """One request, as a test invents it; times are in seconds from its arrival.

    Attributes:
        at_step: the step before which it comes.
        load_s: how long its adapter's load takes where it is the first, negative when that fails.
        cancel_s: when the caller goes away.
    """

    at_step: int
    digest: str = ""
    priority: int = 0
    prompt: int = 4
    answer: int = 4
    load_s: float = 0.0
    deadline_s: float | None = None
    cancel_s: float | None = None


@dataclass
class Live:
    """A call that has come and not ended; ``rank`` is its place in its line."""

    call: Call
    came_s: float
    rank: tuple[float, int]


@dataclass
class Simulator:
    """Runs calls through a scheduler.

    Args:
        memory: tokens that running sequences may hold in all; one that needs more than there is takes
            the victim's place away.
        step_s: what a step takes; each of its tokens takes a hundredth of that on top.
    """

    calls: list[Call]
    max_batch: int = 4
    budget: int = 16
    max_adapters: int = 0
    patience_s: float = 5.0
    memory: float = math.inf
    step_s: float = 0.1
    places: list[Sequence] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    live: dict[Sequence, Live] = field(default_factory=dict)
    work: Counter[Line] = field(default_factory=Counter)
    loads: dict[str, tuple[float, bool]] = field(default_factory=lambda: {"": (0.0, False)})
    num_put_back: int = 0
    num_refused: int = 0

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.num_steps = 0
        self.scheduler = Scheduler(
            max_batch=self.max_batch,
            prefill_budget=self.budget,
            max_waiting=10_000,
            max_adapters=self.max_adapters,
            patience_s=self.patience_s,
            clock=self.clock,
        )
        self._coming = sorted(enumerate(self.calls), key=lambda item: item[1].at_step)

    def run(self, max_steps: int = 100_000) -> None:
        """Step until everybody has ended; fail when that never comes."""
        while not self.is_over:
            self.step()
            assert self.num_steps < max_steps, f"{len(self.live)} never ended"
        assert set(self.ends) == {str(i) for i in range(len(self.calls))}
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert not vars(self.scheduler.waiting)["_accounts"]

    @property
    def is_over(self) -> bool:
        """Whether everybody has come and ended."""
        return not self._coming and not self.live

    def step(self) -> None:
        """Let calls come and go, then do one step's work and check it."""
        self.prepare()
        self.work_on()

    def prepare(self) -> None:
        """Let calls come and go, and take places away where memory runs out."""
        self._arrive()
        self._load()
        self._drop()
        self._make_room()

    def work_on(self) -> None:
        """Do one step's work and check it; the clock moves at its end."""
        self.num_refused = 0
        decoding = {s for s in self.scheduler.running if not s.is_prefilling}
        before = len(self.places)
        scheduled = self.scheduler.next_batch(self._admit)
        assert set(scheduled.decode) == decoding, "decoding never waits for prompts"
        read = sum(count for _, count in scheduled.prefill)
        assert read <= self.budget
        assert all(0 < n <= s.num_uncomputed for s, n in scheduled.prefill)
        assert {s for s, _ in scheduled.prefill} <= set(self.scheduler.running)
        self._check_places(self.places[before:])
        self._check_idle_places(read)
        for sequence in scheduled.decode:
            self.work[line_of(sequence)] += ANSWER_COST
        for sequence, count in scheduled.prefill:
            self.work[line_of(sequence)] += PROMPT_COST * count
        perform(scheduled)
        for sequence in list(self.scheduler.running):
            if sequence.num_generated >= sequence.request.sampling.max_tokens:
                self._end(sequence, "finished")
        seconds = self.step_s * (1 + 0.01 * (read + len(decoding)))
        if not scheduled.is_empty:
            self.scheduler.note_step(seconds)
        self.clock.now += seconds
        self.num_steps += 1

    def _arrive(self) -> None:
        while self._coming and self._coming[0][1].at_step <= self.num_steps:
            i, call = self._coming.pop(0)
            now = self.clock.now
            sequence = make(
                str(i),
                call.prompt,
                digest=call.digest,
                priority=call.priority,
                answer=call.answer,
                is_ready=False,
                deadline_s=None if call.deadline_s is None else now + call.deadline_s,
                arrived_ns=int(now * 1e9),
            )
            due = now + min(DUE_S, math.inf if call.deadline_s is None else call.deadline_s)
            self.live[sequence] = Live(call, now, (due, i))
            self.loads.setdefault(call.digest, (now + abs(call.load_s), call.load_s < 0))
            self.scheduler.add(sequence)

    def _load(self) -> None:
        """End loads, which are of an adapter: the call that it came with first says how long, and how."""
        now = self.clock.now
        for digest, (ready_s, is_bad) in list(self.loads.items()):
            if now < ready_s:
                continue
            for sequence in [s for s in self.live if s.request.lease.digest == digest]:
                lease = sequence.request.lease
                assert isinstance(lease, FakeLease)
                lease.is_ready = not is_bad
                if is_bad:
                    self._end(sequence, "failed")
            if is_bad:
                del self.loads[digest]

    def _drop(self) -> None:
        now = self.clock.now
        late = self.scheduler.late()
        for sequence, live in list(self.live.items()):
            if sequence in late:
                assert sequence.request.deadline_s is not None
                left_s = sequence.request.deadline_s - now
                is_past = left_s <= 0
                assert is_past or sequence not in self.scheduler.running
                assert left_s < self.step_s / 2, "shed although it had a chance"
                self._end(sequence, "late")
            elif live.call.cancel_s is not None and now >= live.came_s + live.call.cancel_s:
                self._end(sequence, "cancelled")
            else:
                deadline = sequence.request.deadline_s
                assert deadline is None or now < deadline

    def _make_room(self) -> None:
        """Take places away until every running sequence has memory for its next token."""
        while self._num_held() + len(self.scheduler.running) > self.memory:
            running = list(self.scheduler.running)
            victim = self.scheduler.victim()
            key = (victim.request.priority, -victim.arrived_ns)
            assert key == min((s.request.priority, -s.arrived_ns) for s in running)
            self.scheduler.preempt(victim)
            victim.num_computed = 0
            self.live[victim].rank = (-math.inf, -self.num_put_back)
            self.num_put_back += 1

    def _num_held(self) -> int:
        return sum(len(s.token_ids) for s in self.scheduler.running)

    def _admit(self, sequence: Sequence) -> bool:
        assert sequence.request.lease.is_ready
        assert sequence not in self.scheduler.running
        needed = len(sequence.token_ids) + 1
        if self._num_held() + len(self.scheduler.running) + needed > self.memory:
            self.num_refused += 1
            return False
        self.places.append(sequence)
        return True

    def _end(self, sequence: Sequence, how: str) -> None:
        name = sequence.request.request_id
        assert name not in self.ends
        self.ends[name] = how
        del self.live[sequence]
        self.scheduler.remove(sequence)

    def _check_places(self, given: list[Sequence]) -> None:
        """Everyone is in one place, in turn, within the limits."""
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(running) + len(waiting) == len(self.live)
        assert {*running, *waiting} == set(self.live)
        assert len(waiting) == len(self.scheduler.waiting)
        assert len(running) <= self.max_batch
        adapters = {s.request.lease.digest for s in running} - {""}
        assert not self.max_adapters or len(adapters) <= self.max_adapters
        for sequence in given:
            rank = self.live[sequence].rank
            behind = [s for s in waiting if line_of(s) == line_of(sequence)]
            assert all(self.live[s].rank > rank for s in behind), "its own line was overtaken"

    def _check_idle_places(self, read: int) -> None:
        """A place stays empty only when nobody could have it, or what is owed has no room."""
        if len(self.scheduler.running) == self.max_batch or read == self.budget:
            return
        if self.num_refused:
            return
        ready = [s for s in self.scheduler.waiting if s.request.lease.is_ready]
        if not self.max_adapters:
            assert not ready
            return
        adapters = {s.request.lease.digest for s in self.scheduler.running} - {""}
        could = [s for s in ready if s.request.lease.digest in {"", *adapters}]
        assert not ready or len(adapters) == self.max_adapters
        # All of one running adapter, which is drained: everything else has been let in.
        assert len({s.request.lease.digest for s in could}) <= 1
        assert not could or could[0].request.lease.digest != ""


def line_of(sequence: Sequence) -> Line:
    """Return where a sequence waits."""
    return sequence.request.priority, sequence.request.lease.digest
