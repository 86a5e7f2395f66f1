"""Aliases in use, followed: what a ref means to new calls, and the turn from one version to the next.

The life of a ref that callers use:

1. The first call resolves it in the registry; from then on it is answered from memory.
2. Every ``--alias-poll`` seconds (jittered) all aliases in use are looked up again, in one go on a
   registry thread: for a folder a few ``stat`` calls each, for a hub what its watch remembers.
3. One that moved is not turned yet: the new version is loaded beside the old one. Once it is on the
   device new calls take it; running ones keep their leases, and the old version can be evicted when
   the last of them ends.
4. If it cannot be loaded, new calls stay with the old version, the log and ``lorary_aliases_behind``
   say so, and it is tried again every ``RETRY_S``, or at once when the alias moves again.
5. One that nobody has used for ``IDLE_S`` is forgotten.

While the registry is away nothing is turned and what is known keeps serving. All of this is on the event
loop; only registry calls are not.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lorary.errors import (
    AccessDenied,
    AdapterNotFound,
    LoraryError,
    RegistryUnavailable,
    StorageError,
)
from lorary.registry.refs import LATEST, parse_ref
from lorary.server.rollout.events import Event
from lorary.server.rollout.loading import arrived
from lorary.server.rollout.splits import Trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.registry.splits import Split
    from lorary.server.ports import RegistryLike, ResidencyLike
    from lorary.server.rollout.endings import Endings
    from lorary.server.rollout.events import Feed
    from lorary.server.targets import Target, Targets

log = logging.getLogger("lorary.server")

MAX_REFS = 16_384
IDLE_S = 600.0
RETRY_S = 30.0
FRESH_S = 30.0
"""How long a number or a digest is answered from memory: it cannot move, but it can be deleted."""
AWAY = (RegistryUnavailable, AccessDenied, StorageError)
"""Errors that say that the registry is away, and nothing about what it holds."""


@dataclass(slots=True, eq=False)
class Followed:
    """One ref that callers use.

    Attributes:
        serving: what new calls get.
        alias: empty for a number or a digest, which does not move.
        trial: the canary behind it.
        behind: why what it means by now is not served; empty when it is.
    """

    ref: str
    serving: Target
    alias: str = ""
    trial: Trial | None = None
    behind: str = ""
    used_s: float = field(default_factory=time.monotonic)
    looked_s: float = field(default_factory=time.monotonic)
    retry_s: float = 0.0
    turning: tuple[str, asyncio.Task[None]] | None = None

    def choose(self, key: str | None) -> Target:
        """Return what answers a call with this key; without one, always the holder."""
        trial = self.trial
        if trial is None or key is None or trial.split.version != self.serving.version:
            return self.serving
        if trial.candidate is not None and trial.takes(key):
            return trial.candidate
        return replace(self.serving, trial=trial, is_shadowed=trial.copies_call(key))


class Follower:
    """What refs mean to new calls.

    Args:
        targets: looks refs up and checks what they mean against the base.
        registry: where aliases move.
        residency: where versions are loaded.
        endings: writes what gates decided.
        feed: is told of every turn.
        poll_s: seconds between two looks.
    """

    def __init__(
        self,
        *,
        targets: Targets,
        registry: RegistryLike,
        residency: ResidencyLike,
        endings: Endings,
        feed: Feed,
        poll_s: float,
    ) -> None:
        self._targets = targets
        self._registry = registry
        self._residency = residency
        self._endings = endings
        self._feed = feed
        self._poll_s = poll_s
        self._known: OrderedDict[str, Followed] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._looking = asyncio.Lock()
        self.trouble = ""
        self.num_turned = 0
        self.num_failed_turns = 0
        self.on_trouble: Callable[[str], object] = lambda _: None

    @property
    def followed(self) -> list[Followed]:
        """All refs in use."""
        return list(self._known.values())

    @property
    def trials(self) -> list[Trial]:
        """All canaries on this server."""
        return [known.trial for known in self._known.values() if known.trial is not None]

    def start(self) -> None:
        """Begin to look."""
        self._spawn(self._run())

    async def stop(self) -> None:
        """Stop looking and give up what is being loaded."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def resolve(self, ref: str, key: str | None = None) -> Target:
        """Return what answers a call; raises as ``Targets.lookup``.

        Args:
            ref: what the caller wrote; not empty.
            key: what decides who is in a canary; ``None`` for the holder.
        """
        known, now = self._known.get(ref), time.monotonic()
        if known is None or (not known.alias and now - known.looked_s > FRESH_S):
            known = await self._learn(ref)
        known.used_s = now
        self._known.move_to_end(ref)
        return known.choose(key)

    async def look(self, name: str = "") -> None:
        """Look up all aliases in use now, or those of one adapter, and begin what follows."""
        async with self._looking:
            known = [k for k in self._known.values() if k.alias and name in ("", k.serving.name)]
            trouble, found = await self._targets.run(self._read, known)
            self._set_trouble(trouble)
            for one, (resolved, split) in zip(known, found, strict=False):
                if one.ref in self._known:
                    self._apply(one, resolved, split)

    async def _run(self) -> None:
        while True:
            # Jittered, so that a hundred servers do not ask a shared folder at the same moment.
            await asyncio.sleep(self._poll_s * random.uniform(0.75, 1.25))
            started = time.monotonic()
            try:
                self._forget_idle()
                await self.look()
                await self._endings.retry(self.trials)
            except Exception:
                # The top of a task: whatever one look met, the next may not.
                log.exception("looking for moved aliases failed; trying again")
            # Many aliases on a slow disk must not keep this server busy with looking.
            await asyncio.sleep(5 * (time.monotonic() - started))

    def _read(
        self, known: list[Followed]
    ) -> tuple[str, list[tuple[Any, Split | LoraryError | None]]]:
        """Look aliases up; on a registry thread."""
        trouble = self._registry.trouble()
        if trouble:
            return trouble, []
        found: list[tuple[Any, Any]] = []
        for one in known:
            try:
                resolved: Any = self._registry.resolve(one.ref)
                found.append((resolved, self._registry.rollouts.of(resolved.name, one.alias)))
            except AWAY as error:
                return str(error), []
            except LoraryError as error:
                found.append((error, None))
        return "", found

    async def _learn(self, ref: str) -> Followed:
        """Resolve a ref that nobody has used lately."""
        parsed = parse_ref(ref)
        old = self._known.get(ref)
        try:
            serving = await self._targets.lookup(ref)
            split = (
                await self._targets.run(self._registry.rollouts.of, parsed.name, parsed.alias)
                if parsed.alias not in (None, LATEST)
                else None
            )
        except AWAY as error:
            if old is None:
                raise
            self._set_trouble(str(error))
            return old
        except LoraryError:
            if old is not None:
                self._drop(old)
            raise
        # Somebody else may have learnt it meanwhile.
        known = self._known.setdefault(ref, Followed(ref, serving, parsed.alias or ""))
        known.looked_s = time.monotonic()
        if not known.alias:
            known.serving = serving
        elif known.serving is serving:
            self._set_trial(known, split)
        while len(self._known) > MAX_REFS:
            self._drop(next(iter(self._known.values())))
        return known

    def _apply(self, known: Followed, resolved: Any, split: Any) -> None:
        """Begin what follows from a look at one alias."""
        if isinstance(resolved, AdapterNotFound):
            log.warning("'%s' is gone from the registry: %s", known.ref, resolved)
            self._drop(known)
            return
        if isinstance(resolved, LoraryError):
            self._stay(known, resolved)
            return
        if resolved.digest == known.serving.digest:
            if known.turning is not None:  # it moved there and back
                known.turning[1].cancel()
            known.behind = ""
            if resolved.version != known.serving.version:
                known.serving = replace(known.serving, version=resolved.version, resolved=resolved)
        else:
            self._begin_turn(known, resolved)
        self._set_trial(known, split)

    def _begin_turn(self, known: Followed, resolved: Any) -> None:
        if known.turning is not None:
            if known.turning[0] == resolved.digest:
                return
            known.turning[1].cancel()
        elif known.behind and time.monotonic() < known.retry_s:
            return
        known.turning = (resolved.digest, self._spawn(self._turn(known, resolved)))

    async def _turn(self, known: Followed, resolved: Any) -> None:
        """Load what an alias means by now, then give it to new calls."""
        old, task = known.serving, asyncio.current_task()
        try:
            target = await self._ready(known.ref, resolved)
        except LoraryError as error:
            self.num_failed_turns += 1
            self._stay(known, error, resolved)
        else:
            known.serving, known.behind = target, ""
            self.num_turned += 1
            log.info(
                "'%s' turned from version %d to %d (%s)",
                known.ref,
                old.version,
                target.version,
                target.digest[:19],
            )
            self._tell("alias_moved", known, target, f"from version {old.version}")
        finally:
            if known.turning is not None and known.turning[1] is task:
                known.turning = None

    async def _ready(self, ref: str, resolved: Any) -> Target:
        """Return a version as a target once it is checked and on the device."""
        target = await self._targets.describe(ref, resolved)
        lease = self._residency.acquire(resolved)
        try:
            await arrived(lease)
        finally:
            lease.release()
        return target

    def _stay(self, known: Followed, error: LoraryError, resolved: Any = None) -> None:
        """Keep serving what is served, and say why."""
        known.retry_s = time.monotonic() + RETRY_S * random.uniform(0.75, 1.25)
        if known.behind == str(error):
            return
        known.behind = str(error)
        meant = f"version {resolved.version}" if resolved else "what it means now"
        log.warning(
            "'%s' stays at version %d; %s cannot be served: %s",
            known.ref,
            known.serving.version,
            meant,
            error,
        )
        self._tell("alias_behind", known, known.serving, str(error))

    def _set_trial(self, known: Followed, split: Split | None) -> None:
        """Begin or end a canary as the log says."""
        trial = known.trial
        if split == (trial.split if trial else None):
            return
        if trial is not None:
            self._tell("canary_ended", known, trial.candidate or known.serving, trial.problem)
        known.trial = None
        if split is not None:
            known.trial = trial = Trial(known.serving.name, split)
            self._spawn(self._begin_trial(known, trial))

    async def _begin_trial(self, known: Followed, trial: Trial) -> None:
        """Load a canary's candidate; until it is there the holder answers everybody."""
        ref = f"{trial.name}@{trial.split.canary.version}"
        try:
            resolved = await self._targets.run(self._registry.resolve, ref)
            candidate = await self._ready(known.ref, resolved)
        except LoraryError as error:
            log.warning("canary of '%s' cannot begin here: %s", known.ref, error)
            trial.problem = str(error)
            self._tell("alias_behind", known, known.serving, f"canary {ref}: {error}")
            self._endings.cannot_load(trial, error)
            return
        trial.candidate = replace(candidate, is_canary=True, trial=trial)
        trial.state = "running"
        log.info("canary of '%s' begins: %s", known.ref, trial.split.canary)
        self._tell("canary_started", known, candidate, str(trial.split.canary))

    def _set_trouble(self, trouble: str) -> None:
        """Say once that the registry is away, and once that it is back."""
        if bool(trouble) != bool(self.trouble):
            if trouble:
                log.warning("the registry is away; what is known keeps serving: %s", trouble)
            else:
                log.warning("the registry is back")
            kind: Any = "registry_away" if trouble else "registry_back"
            self._feed.tell(Event(kind=kind, detail=trouble))
            self.on_trouble(trouble)
        self.trouble = trouble

    def _forget_idle(self) -> None:
        now = time.monotonic()
        for known in self.followed:
            # What was measured of a canary is kept however rare its calls are.
            if known.alias and known.trial is None and now - known.used_s > IDLE_S:
                self._drop(known)

    def _drop(self, known: Followed) -> None:
        self._known.pop(known.ref, None)
        if known.turning is not None:
            known.turning[1].cancel()

    def _tell(self, kind: Any, known: Followed, target: Target, detail: str = "") -> None:
        self._feed.tell(
            Event(
                kind=kind,
                name=target.name,
                version=target.version,
                digest=target.digest,
                alias=known.alias,
                detail=detail,
            )
        )

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
