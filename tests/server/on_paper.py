"""Sequences, leases, a clock and steps on paper: what drives a scheduler without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.server.engine.request import Request, Sampling
from lorary.server.engine.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.errors import LoraryError
    from lorary.server.engine.scheduler import Scheduled, Scheduler


@dataclass
class Clock:
    """Seconds that pass when told so."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeLease:
    """A lease that is ready when told so."""

    is_ready: bool = True
    digest: str = ""
    error: LoraryError | None = None

    def release(self) -> None:
        """Nothing is held."""


def make(
    name: str,
    prompt: int,
    *,
    is_ready: bool = True,
    digest: str = "",
    priority: int = 0,
    deadline_s: float | None = None,
    answer: int = 4,
    arrived_ns: int = 0,
) -> Sequence:
    request = Request(
        request_id=name,
        prompt_ids=[1] * prompt,
        sampling=Sampling(max_tokens=answer),
        lease=FakeLease(is_ready, digest),
        priority=priority,
        deadline_s=deadline_s,
    )
    return Sequence(request=request, token_ids=[1] * prompt, arrived_ns=arrived_ns)


def perform(scheduled: Scheduled) -> None:
    """Do to the sequences what a forward pass would."""
    for sequence in scheduled.decode:
        sequence.num_computed += 1
        sequence.token_ids.append(1)
    for sequence, count in scheduled.prefill:
        sequence.num_computed += count
        if not sequence.is_prefilling:
            sequence.token_ids.append(1)


def advance(
    scheduler: Scheduler, admit: Callable[[Sequence], bool] = lambda s: True
) -> tuple[list[str], list[tuple[str, int]]]:
    """Run one step; return who decoded, and who read how many prompt tokens."""
    scheduled = scheduler.next_batch(admit)
    perform(scheduled)
    return (
        [s.request.request_id for s in scheduled.decode],
        [(s.request.request_id, count) for s, count in scheduled.prefill],
    )
