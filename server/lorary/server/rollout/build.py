"""The parts of ``lorary.server.rollout``, put together for one server."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.server.rollout.aliases import Follower
from lorary.server.rollout.endings import Endings
from lorary.server.rollout.events import Event, Feed
from lorary.server.rollout.metrics import RolloutCollector
from lorary.server.rollout.observed import Observer
from lorary.server.rollout.shadow import Shadows
from lorary.server.rollout.traffic import Traffic

if TYPE_CHECKING:
    from lorary.server.build import Backend
    from lorary.server.calls import Calls
    from lorary.server.targets import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Everything that knows of versions under traffic."""

    follower: Follower
    endings: Endings
    shadows: Shadows
    observer: Observer
    traffic: Traffic
    feed: Feed

    def start(self) -> None:
        """Begin to follow aliases; on the event loop."""
        self.feed.attach(asyncio.get_running_loop())
        self.follower.start()

    def on_residency(self, kind: Any, resolved: Any, why: str) -> None:
        """Tell of a change on the device; callable from any thread."""
        self.feed.tell(
            Event(
                kind=kind,
                name=resolved.name,
                version=resolved.version,
                digest=resolved.digest,
                detail=why,
            )
        )

    async def stop(self) -> None:
        """Stop following and end all copies; lines that are being written to the registry are."""
        await self.shadows.stop()
        await self.endings.settled()
        await self.follower.stop()

    def collector(self, limit: int) -> RolloutCollector:
        """Return what reads the metrics."""
        return RolloutCollector(self.follower, self.endings, self.shadows, limit=limit)


def build_rollout(backend: Backend, targets: Targets, calls: Calls, *, poll_s: float) -> Rollout:
    """Put the parts together; nothing runs yet. From here on ``targets`` answers from memory."""
    feed, traffic = Feed(), Traffic()
    endings = Endings(registry=backend.registry, run=targets.run, actor=server_name(), feed=feed)
    follower = Follower(
        targets=targets,
        registry=backend.registry,
        residency=backend.residency,
        endings=endings,
        feed=feed,
        poll_s=poll_s,
    )
    endings.on_written = follower.look
    targets.follow(follower.resolve)
    rollout = Rollout(
        follower=follower,
        endings=endings,
        shadows=Shadows(
            engine=backend.engine, residency=backend.residency, calls=calls, endings=endings
        ),
        observer=Observer(endings, traffic),
        traffic=traffic,
        feed=feed,
    )
    backend.residency.listen(rollout.on_residency)
    return rollout


def server_name() -> str:
    """Return how this server signs the lines that it writes to an alias log."""
    return f"server {socket.gethostname()}:{os.getpid()}"
