"""What happens to adapters and rollouts, told to whoever watches; nobody who is slow slows it down.

Everything may be told from any thread; it reaches the subscribers on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lorary.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal[
    "loading",
    "resident",
    "load_failed",
    "evicted",
    "unloading",
    "pinned",
    "unpinned",
    "alias_moved",
    "alias_behind",
    "canary_started",
    "canary_ended",
    "canary_promoted",
    "registry_away",
    "registry_back",
]

BUFFER = 1024
"""Events that wait for one subscriber; the oldest go first when there are more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: what.
        name: the adapter; empty when it is about the registry.
        version: its version.
        digest: the version's digest.
        alias: the alias that moved or has the canary.
        detail: why, or from where; for people.
        at_s: when, in seconds since 1970.
    """

    kind: Kind
    name: str = ""
    version: int = 0
    digest: str = ""
    alias: str = ""
    detail: str = ""
    at_s: float = field(default_factory=time.time)


class Subscription:
    """One subscriber's events, at most ``BUFFER`` of them."""

    def __init__(self, limit: int) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self._num_lost = 0
        self._ready = asyncio.Event()
        self._is_closed = False

    def wake(self) -> None:
        """Let whoever waits look around, although nothing happened."""
        self._ready.set()

    def close(self) -> None:
        """End the subscription from our side."""
        self._is_closed = True
        self.wake()

    def put(self, event: Event) -> None:
        """Keep an event; the oldest is lost when there is no room."""
        self._num_lost += len(self._events) == self._events.maxlen
        self._events.append(event)
        self._ready.set()

    async def take(self) -> tuple[list[Event], int]:
        """Wait for events; return them, and how many before them were lost.

        Raises:
            Unavailable: the server stops.
        """
        await self._ready.wait()
        if self._is_closed:
            raise Unavailable("the server stops; watch another replica.")
        events, num_lost = list(self._events), self._num_lost
        self._events.clear()
        self._num_lost = 0
        self._ready.clear()
        return events, num_lost


class Feed:
    """Where events are told and heard.

    Args:
        limit: events that wait for one subscriber.
    """

    def __init__(self, limit: int = BUFFER) -> None:
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscriptions: set[Subscription] = set()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say on which loop the subscribers are; before that, events are told to nobody."""
        self._loop = loop

    def tell(self, event: Event) -> None:
        """Tell every subscriber; returns at once, callable from any thread and under any lock."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._put, event)

    @contextmanager
    def subscribed(self) -> Iterator[Subscription]:
        """Hear what is told from now on; on the event loop."""
        subscription = Subscription(self._limit)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def wake(self) -> None:
        """Let every subscriber look around; on the event loop."""
        for subscription in self._subscriptions:
            subscription.wake()

    def close(self) -> None:
        """End every subscription; on the event loop."""
        for subscription in self._subscriptions:
            subscription.close()

    def _put(self, event: Event) -> None:
        for subscription in self._subscriptions:
            subscription.put(event)
