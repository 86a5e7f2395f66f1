"""Which adapters Serve sends here: told through its multiplexing, which then owns nothing.

Serve remembers so many ids per replica, forgets the least recently used, and calls that unloading. Taken at
its word it takes adapters away from running answers (Ray 2.60: ``__del__`` of the model, whoever reads it).
Here an id is a name and nothing hangs on it: memory is the residency's, which gives up what no lease holds.
All that forgetting does is that the name's next call may go elsewhere; so names in use are never what is
forgotten, as long as others are there.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable


class Announce(Protocol):
    """A function behind ``@serve.multiplexed``: the least recently used of its ids is forgotten first."""

    def __call__(self, name: str, /) -> Awaitable[str]:
        """Make ``name`` the most recently used."""
        ...


class Announcer:
    """Keeps Serve's list of ids in the order that protects names in use; on one event loop.

    Args:
        announce: Serve's function.
        limit: how many ids it remembers.
    """

    def __init__(self, announce: Announce, limit: int) -> None:
        self._announce = announce
        self._limit = limit
        # What Serve remembers, in its order.
        self._told: OrderedDict[str, None] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def enter(self, name: str) -> None:
        """A call uses this adapter, until ``leave``."""
        self._in_use[name] += 1
        task = asyncio.get_running_loop().create_task(self._tell(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def leave(self, name: str) -> None:
        """A call that used this adapter has ended."""
        self._in_use[name] -= 1
        if not self._in_use[name]:
            del self._in_use[name]

    async def _tell(self, name: str) -> None:
        async with self._lock:
            if name not in self._told and len(self._told) >= self._limit:
                for used in [one for one in self._told if one in self._in_use]:
                    await self._touch(used)
            await self._touch(name)

    async def _touch(self, name: str) -> None:
        await self._announce(name)
        if name not in self._told and len(self._told) >= self._limit:
            self._told.popitem(last=False)
        self._told[name] = None
        self._told.move_to_end(name)
