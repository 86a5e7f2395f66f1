"""Callers who stop reading: a stream waits for them so long, and then ends.

What a caller does not read stands in buffers, and once these are full, in the call's queue; the call keeps its place
among those that the server takes, and a drain waits for it. The engine waits for nobody: it makes the answer to its
end and frees what that held.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorary.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorary.server.caller import Caller


class Writer:
    """Writes events to one caller. One timer watches all of a stream, for a timer per token would cost more.

    Args:
        caller: who reads.
        limit_s: how long one event may wait for them.
    """

    def __init__(self, caller: Caller, limit_s: float) -> None:
        self._caller = caller
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._began_s: float | None = None
        self._is_stalled = False

    async def write(self, event: Any) -> None:
        """Send one event; within ``watched`` only."""
        self._began_s = self._loop.time()
        await self._caller.write(event)
        self._began_s = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what is written inside.

        Raises:
            Cancelled: an event has waited for ``limit_s``.
        """
        task = asyncio.current_task()
        assert task is not None, "outside of a call"

        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            waited_s = 0.0 if self._began_s is None else self._loop.time() - self._began_s
            if waited_s >= self._limit_s:
                self._is_stalled = True
                task.cancel()
            else:
                timer = self._loop.call_later(self._limit_s - waited_s, look)

        timer = self._loop.call_later(self._limit_s, look)
        try:
            yield
        except asyncio.CancelledError as error:
            # Somebody else may have cancelled the call at the same time, and then means it.
            if not self._is_stalled or task.uncancel() > 0:
                raise
            raise Cancelled(
                f"the caller has read nothing for {self._limit_s:g} s (--stall-timeout); the stream has ended."
            ) from error
        finally:
            timer.cancel()
