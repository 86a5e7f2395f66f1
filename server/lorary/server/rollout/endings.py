"""The end of a canary: what its gates decided, written into the alias log by compare-and-swap.

Every server judges what it saw itself and none asks another. Whoever decides first writes; to the
others the compare-and-swap says that the canary they meant no longer runs, and they accept that. While
the registry cannot be written, a failed canary gets no calls here all the same, and the line is tried
again at every look.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from lorary.errors import (
    AdapterNotFound,
    Conflict,
    CorruptArtifact,
    IncompatibleAdapter,
    LoraryError,
)
from lorary.server.rollout.events import Event

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from lorary.server.ports import RegistryLike
    from lorary.server.rollout.events import Feed
    from lorary.server.rollout.splits import Trial

log = logging.getLogger("lorary.server")

ITS_OWN_FAULT = (CorruptArtifact, IncompatibleAdapter)
"""Errors of a load that are the version's and will not pass."""


class Endings:
    """Ends and promotes canaries in the registry.

    Args:
        registry: whose alias log it is.
        run: runs a blocking call on a registry thread.
        actor: this server, as the log shall name it.
        feed: is told.
    """

    def __init__(
        self,
        *,
        registry: RegistryLike,
        run: Callable[..., Awaitable[Any]],
        actor: str,
        feed: Feed,
    ) -> None:
        self._registry = registry
        self._run = run
        self._actor = actor
        self._feed = feed
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: dict[Trial, str] = {}
        self._writing: set[Trial] = set()
        self.counts = {"failed": 0, "promoted": 0, "lost": 0}
        self.on_written: Callable[[str], Awaitable[object]] | None = None

    def judge(self, trial: Trial) -> None:
        """Look at a canary's gates after one more call; returns at once."""
        if trial.state != "running":
            return
        verdict = trial.judge()
        if verdict.kind == "fail":
            self._fail(trial, verdict.reason)
        elif verdict.kind == "pass" and trial.split.canary.promote_after:
            trial.state = "passed"
            log.warning("canary of '%s' passed: %s", trial.place, verdict.reason)
            self._write_soon(trial, verdict.reason)

    def cannot_load(self, trial: Trial, error: LoraryError) -> None:
        """End a canary that has gates and cannot be served, for a reason that is its own."""
        if trial.split.canary.gates.has_any and isinstance(error, ITS_OWN_FAULT):
            self._fail(trial, f"version {trial.split.canary.version} cannot be loaded: {error}")

    async def retry(self, trials: Iterable[Trial]) -> None:
        """Write what could not be written before, for canaries that still run."""
        running = set(trials)
        for trial, reason in list(self._pending.items()):
            if trial in running:
                await self._write(trial, reason)
            else:
                del self._pending[trial]

    async def settled(self) -> None:
        """Wait until what is being written is written."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _fail(self, trial: Trial, reason: str) -> None:
        # From here on its holder answers everybody, whatever becomes of the line in the log.
        trial.state = "failed"
        trial.problem = reason
        log.warning("canary of '%s' failed: %s", trial.place, reason)
        self._write_soon(trial, reason)

    def _write_soon(self, trial: Trial, reason: str) -> None:
        self._pending[trial] = reason
        task = asyncio.get_running_loop().create_task(self._write(trial, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, trial: Trial, reason: str) -> None:
        if trial in self._writing:
            return
        is_promoted = trial.state == "passed"
        self._writing.add(trial)
        try:
            await self._run(self._record, trial, reason, is_promoted)
        except (Conflict, AdapterNotFound) as error:
            self.counts["lost"] += 1
            log.info("canary of '%s' was ended by somebody else: %s", trial.place, error)
        except LoraryError as error:
            problem = f"{reason}; this cannot be written to the registry: {error}"
            if trial.problem != problem:
                log.warning("canary of '%s': %s", trial.place, problem)
            trial.problem = problem
            return
        else:
            self.counts["promoted" if is_promoted else "failed"] += 1
            if is_promoted:
                event = Event(
                    kind="canary_promoted",
                    name=trial.name,
                    version=trial.split.canary.version,
                    alias=trial.split.alias,
                    detail=reason,
                )
                self._feed.tell(event)
        finally:
            self._writing.discard(trial)
        self._pending.pop(trial, None)
        if self.on_written is not None:
            await self.on_written(trial.name)

    def _record(self, trial: Trial, reason: str, is_promoted: bool) -> None:
        rollouts, split = self._registry.rollouts, trial.split
        change = rollouts.promote if is_promoted else rollouts.stop
        change(trial.name, split.alias, expect=split, reason=reason, actor=self._actor)
