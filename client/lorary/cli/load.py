"""Load on a server from outside: who asks what when, and what each call saw. No terminal here."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorary.client.results import GenerateResult
from lorary.errors import LoraryError, Overloaded, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorary.client import AsyncClient

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What load to make.

    Attributes:
        adapters: refs, the most popular first; an empty one is the bare base.
        skew: exponent of Zipf's law over them: the k-th is drawn in proportion to ``k ** -skew``; 0
            draws all alike.
        num_calls: calls in all.
        concurrency: most calls at once; a closed loop keeps as many in flight.
        rate: calls a second, at random moments (a Poisson process), whether or not earlier ones have
            ended; 0 makes a closed loop.
        prompts: token ids to draw from.
        new_tokens: of every answer, whatever it says.
        seed: of all draws.
    """

    adapters: tuple[str, ...]
    skew: float
    num_calls: int
    concurrency: int
    rate: float
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    seed: int


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one call saw; times in seconds.

    Attributes:
        adapter: the ref.
        due_s: when it should have been sent, on the run's clock; what waits for its turn to be sent
            counts, or a slow server would be asked less and look better (coordinated omission).
        first_s: until its first token; None without one.
        gaps_s: between tokens that came apart.
        end_s: until its end.
        num_tokens: that it got.
        error: the reason it failed for; empty if it did not.
    """

    adapter: str
    due_s: float
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run in figures; latencies in milliseconds by percentile.

    Attributes:
        seconds: from the first call's due time to the last answer's end.
        num_calls: that were made.
        num_answers: that ended as they should.
        answers_per_s: answers a second.
        tokens_per_s: tokens a second, those of failed calls included.
        first_token_ms: time to the first token.
        next_token_ms: time between two tokens.
        whole_ms: time to the end.
        errors: failed calls by reason.
        calls_by_adapter: calls by ref, the most first.
    """

    seconds: float
    num_calls: int
    num_answers: int
    answers_per_s: float
    tokens_per_s: float
    first_token_ms: dict[str, float]
    next_token_ms: dict[str, float]
    whole_ms: dict[str, float]
    errors: dict[str, int]
    calls_by_adapter: dict[str, int]


async def run(
    client: AsyncClient, plan: Plan, *, on_end: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Make the load; return every call's outcome, by due time.

    Errors of the server are outcomes; a call is never repeated here.
    """
    rng = random.Random(plan.seed)
    calls = list(itertools.islice(_calls(plan, rng), plan.num_calls))
    started = time.perf_counter()
    places = asyncio.Semaphore(plan.concurrency)

    async def one(adapter: str, prompt: Sequence[int], offset_s: float) -> Outcome:
        if plan.rate:
            await asyncio.sleep(max(0.0, started + offset_s - time.perf_counter()))
            async with places:
                return await _call(client, plan, adapter, prompt, started + offset_s, on_end)
        async with places:
            return await _call(client, plan, adapter, prompt, time.perf_counter(), on_end)

    outcomes = await asyncio.gather(*(one(*call) for call in calls))
    for outcome in outcomes:
        outcome.due_s -= started
    return sorted(outcomes, key=lambda outcome: outcome.due_s)


def _calls(plan: Plan, rng: random.Random) -> Iterator[tuple[str, Sequence[int], float]]:
    """Yield adapter, prompt and offset of one call after the other."""
    weights = list(itertools.accumulate((k + 1) ** -plan.skew for k in range(len(plan.adapters))))
    offset_s = 0.0
    while True:
        drawn = bisect.bisect(weights, rng.random() * weights[-1])
        adapter = plan.adapters[min(drawn, len(weights) - 1)]
        yield adapter, rng.choice(plan.prompts), offset_s
        if plan.rate:
            offset_s += rng.expovariate(plan.rate)


async def _call(
    client: AsyncClient,
    plan: Plan,
    adapter: str,
    prompt: Sequence[int],
    due_s: float,
    on_end: Callable[[Outcome], None],
) -> Outcome:
    outcome = Outcome(adapter=adapter, due_s=due_s)
    last_s = due_s
    try:
        async for event in client.stream(
            token_ids=prompt, adapter=adapter, max_tokens=plan.new_tokens, ignore_eos=True
        ):
            now = time.perf_counter()
            if isinstance(event, GenerateResult) or not event.token_ids:
                continue
            if outcome.first_s is None:
                outcome.first_s = now - due_s
            else:
                outcome.gaps_s.append(now - last_s)
            last_s = now
            outcome.num_tokens += len(event.token_ids)
    except LoraryError as error:
        outcome.error = reason(type(error))
        if isinstance(error, Overloaded):
            # In a closed loop the next call would come at once, and be refused as well.
            await asyncio.sleep(min(error.retry_after_s, 1.0) if not plan.rate else 0.0)
    outcome.end_s = time.perf_counter() - due_s
    on_end(outcome)
    return outcome


def summarize(outcomes: Sequence[Outcome]) -> Report:
    """Return the figures of a run.

    Args:
        outcomes: at least one.
    """
    answered = [o for o in outcomes if not o.error]
    seconds = max(o.due_s + o.end_s for o in outcomes) - min(o.due_s for o in outcomes)
    per_s = 1 / max(seconds, 1e-9)
    return Report(
        seconds=round(seconds, 3),
        num_calls=len(outcomes),
        num_answers=len(answered),
        answers_per_s=round(len(answered) * per_s, 3),
        tokens_per_s=round(sum(o.num_tokens for o in outcomes) * per_s, 1),
        first_token_ms=percentiles([o.first_s for o in answered if o.first_s is not None]),
        next_token_ms=percentiles([gap for o in answered for gap in o.gaps_s]),
        whole_ms=percentiles([o.end_s for o in answered]),
        errors=dict(Counter(o.error for o in outcomes if o.error).most_common()),
        calls_by_adapter=dict(Counter(o.adapter for o in outcomes).most_common()),
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return ``PERCENTILES`` of what was measured (nearest rank), in milliseconds; none of nothing."""
    ordered = sorted(seconds)
    return {
        f"p{p}": round(1e3 * ordered[math.ceil(p / 100 * len(ordered)) - 1], 2)
        for p in PERCENTILES
        if ordered
    }
