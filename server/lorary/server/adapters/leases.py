"""Holds on adapters: what a request carries from admission to its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.errors import LoraryError
    from lorary.server.adapters.resident import Resident
    from lorary.server.adapters.segments import PoolEntry


class BaseLease:
    """The lease of a request without an adapter: always ready, holds nothing."""

    digest = ""
    is_ready = True
    error: LoraryError | None = None
    entry: PoolEntry | None = None
    load_ns = 0

    def release(self) -> None:
        """Do nothing."""


class AdapterLease:
    """A hold on one resident version.

    Args:
        resident: the version's record.
        release: gives the hold back; called once or more.
    """

    def __init__(
        self, resident: Resident, release: Callable[[AdapterLease, Resident], None]
    ) -> None:
        self._release = release
        self._resident = resident
        self._acquired_ns = time.monotonic_ns()
        self._was_ready = resident.entry is not None
        self._released = False

    @property
    def digest(self) -> str:
        """The version's digest."""
        return self._resident.resolved.digest

    @property
    def is_ready(self) -> bool:
        """Whether the version is on the device."""
        return self._resident.entry is not None

    @property
    def error(self) -> LoraryError | None:
        """Why the load failed, if it did."""
        return self._resident.error

    @property
    def entry(self) -> PoolEntry | None:
        """Its place in the pool once ready."""
        return self._resident.entry

    @property
    def load_ns(self) -> int:
        """Nanoseconds this holder waited for the load."""
        if self._was_ready or not self._resident.ready_ns:
            return 0
        return max(0, self._resident.ready_ns - self._acquired_ns)

    def release(self) -> None:
        """Give the hold back; a second call does nothing."""
        self._release(self, self._resident)

    def mark_released(self) -> bool:
        """Return whether this is the first release; called under the residency's lock."""
        first, self._released = not self._released, True
        return first
