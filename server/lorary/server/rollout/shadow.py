"""Copies of calls: a candidate answers beside the holder, is compared with it, and nobody is sent that.

A copy is submitted right behind its call, at the lowest priority, so it rides in the same steps. It is only
made while no answer waits for a place, and it ends with its call when that ends early. Sampled calls are
compared, too: both sides draw from the same seed.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorary.errors import LoraryError
from lorary.server.rollout.compare import compare_labels, compare_tokens, compare_vectors
from lorary.server.rollout.observed import NOT_ITS_FAULT, Observation
from lorary.server.validate import MAX_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from lorary.server.calls import Calls
    from lorary.server.engine.request import Request
    from lorary.server.ports import EngineLike, ResidencyLike
    from lorary.server.rollout.compare import Difference
    from lorary.server.rollout.endings import Endings
    from lorary.server.rollout.splits import Trial
    from lorary.server.targets import Target

log = logging.getLogger("lorary.server")

MAX_COPIES = 64


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A call made ready for one version: the engine's request, and the labels that it scores."""

    request: Request
    labels: Sequence[str] = ()


class Shadows:
    """The copies under way; on the event loop.

    Args:
        engine: where they run.
        residency: where their candidate is.
        calls: how their outputs arrive.
        endings: judges the canary after each.
    """

    def __init__(
        self, *, engine: EngineLike, residency: ResidencyLike, calls: Calls, endings: Endings
    ) -> None:
        self._engine = engine
        self._residency = residency
        self._calls = calls
        self._endings = endings
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_same = self.num_different = self.num_failed = self.num_skipped = 0

    @contextmanager
    def copying(
        self,
        target: Target,
        original: Prepared,
        observation: Observation,
        prepare: Callable[[Target], Awaitable[Prepared]],
    ) -> Iterator[None]:
        """Run a copy beside the call that is submitted inside, if ``target`` asks for one.

        The copy's task gets its first turn when the block waits, so its call is submitted before it.

        Args:
            target: what answers the call.
            original: the call itself.
            observation: what the call answers; complete when the block ends without an error.
            prepare: makes the same call ready for another version.
        """
        task: asyncio.Task[None] | None = None
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        trial: Trial | None = target.trial
        if target.is_shadowed and trial is not None and trial.candidate is not None:
            if self._engine.num_waiting or len(self._tasks) >= MAX_COPIES:
                self.num_skipped += 1
                trial.copies.num_skipped += 1
            else:
                work = self._copy(trial, trial.candidate, original, observation, prepare, ended)
                task = asyncio.get_running_loop().create_task(work)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        try:
            yield
        except BaseException:
            if task is not None:
                task.cancel()
            raise
        ended.set_result(None)

    async def stop(self) -> None:
        """End all copies."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _copy(
        self,
        trial: Trial,
        candidate: Target,
        original: Prepared,
        observation: Observation,
        prepare: Callable[[Target], Awaitable[Prepared]],
        ended: asyncio.Future[None],
    ) -> None:
        """Answer a call a second time, then compare."""
        copies = trial.copies
        try:
            prepared = await prepare(candidate)
            theirs = await self._answer(candidate, original.request, prepared.request)
            await ended
            difference = _compare(observation, original.labels, theirs, prepared.labels)
        except NOT_ITS_FAULT:
            self.num_skipped += 1
            copies.num_skipped += 1
            return
        except LoraryError as error:
            self.num_failed += 1
            copies.num_errors += 1
            copies.last_error = f"{type(error).__name__}: {error}"[:300]
        except Exception as error:
            # The top of a task: a copy must never be noticed by anybody but the canary's gates.
            log.exception("the copy of a call to '%s' failed", trial.place)
            self.num_failed += 1
            copies.num_errors += 1
            copies.last_error = type(error).__name__
        else:
            copies.num_compared += 1
            copies.divergence_sum += difference.divergence
            if difference.first < 0:
                self.num_same += 1
                copies.num_same += 1
            else:
                self.num_different += 1
                copies.first_difference = difference.first
        self._endings.judge(trial)

    async def _answer(self, candidate: Target, original: Request, copy: Request) -> Observation:
        """Run the copy on the engine and return what it answers."""
        key = f"{original.request_id}/copy"
        theirs = Observation()
        with self._calls.listening(key, (candidate.digest,)) as outputs:
            lease: Any = self._residency.acquire(candidate.resolved)
            request = replace(copy, request_id=key, index=0, priority=-MAX_PRIORITY, lease=lease)
            try:
                self._engine.submit(request)
            except BaseException:
                lease.release()
                raise
            try:
                while True:
                    output = await outputs.get()
                    if output.error is not None:
                        raise output.error
                    theirs.see(output)
                    if output.finish is not None:
                        return theirs
            except BaseException:
                self._engine.cancel(key)
                raise


def _compare(
    ours: Observation, our_labels: Sequence[str], theirs: Observation, their_labels: Sequence[str]
) -> Difference:
    if ours.embedding:
        return compare_vectors(ours.embedding, theirs.embedding)
    if not our_labels:
        return compare_tokens(ours.token_ids, theirs.token_ids)
    return compare_labels(
        dict(zip(our_labels, ours.logprobs, strict=True)),
        dict(zip(their_labels, theirs.logprobs, strict=True)),
    )
