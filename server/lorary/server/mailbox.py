"""A queue between one event loop's callbacks and the one coroutine that reads it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """``asyncio.Queue`` for a single reader and no bound, at half its cost; on one event loop only.

    A stream's reader takes one item a step, so what a queue does for an item is done for every token.
    """

    __slots__ = ("_is_due", "_items", "_waiter", "has_begun")

    def __init__(self) -> None:
        # Whether anything was ever in it.
        self.has_begun = False
        self._items: deque[T] = deque()
        self._is_due = False
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """Return how many items nobody has taken."""
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item, and wake the reader."""
        self.put_quietly(item)
        self.wake()

    def put_quietly(self, item: T) -> None:
        """Add an item that may wait for others: ``get_all`` leaves it there until ``wake``."""
        self.has_begun = True
        self._items.append(item)

    def wake(self) -> None:
        """Let the reader take what there is, now or when it comes next; nothing happens where there is none."""
        if not self._items:
            return
        self._is_due = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def get(self) -> T:
        """Return the oldest item, once there is one; a reader that is cancelled has taken none."""
        while not self._items:
            await self._wait()
        return self._items.popleft()

    async def get_all(self) -> list[T]:
        """Return all items, the oldest first, once the reader may take them; one that is cancelled has taken none.

        A reader that was busy waits for ``wake``, too: with very many of them somebody always is.
        """
        while not self._is_due:
            await self._wait()
        items = [*self._items]
        self._items.clear()
        self._is_due = False
        return items

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
