"""Adapters in host memory, by digest, within a byte budget: what an eviction from the device leaves.

A copy that is being read while it is evicted lives until its reader is done; the budget counts what is kept.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.server.adapters.eviction import Eviction

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.server.adapters.host_copy import HostCopy
    from lorary.server.adapters.load_times import LoadTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStats:
    """What host memory holds, and how often it helped since the start."""

    num_adapters: int
    num_bytes: int
    num_hits: int
    num_misses: int


class HostTier:
    """Copies of adapters. Thread-safe.

    Args:
        memory_bytes: for all copies; 0 keeps none.
        times: what loads take; what is dear to bring back stays longer.
        on_device: whether a digest is on the device now. Copies of those go first: leaving the device
            makes them anew.
    """

    def __init__(
        self,
        memory_bytes: int,
        times: LoadTimes,
        *,
        on_device: Callable[[str], bool] = lambda _digest: False,
    ) -> None:
        self._memory_bytes = memory_bytes
        self._times = times
        self._on_device = on_device
        self._lock = threading.Lock()
        self._copies: dict[str, HostCopy] = {}
        self._eviction = Eviction()
        self._used = self._hits = self._misses = 0

    @property
    def is_on(self) -> bool:
        """Whether anything is ever kept."""
        return self._memory_bytes > 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._copies

    def digests(self) -> list[str]:
        """Return whose copies are here."""
        with self._lock:
            return list(self._copies)

    def get(self, digest: str) -> HostCopy | None:
        """Return a copy, and count the use."""
        with self._lock:
            copy = self._copies.get(digest)
            if copy is None:
                self._misses += 1
                return None
            self._hits += 1
            self._eviction.use(digest)
            return copy

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether a copy of this size could be kept, at others' expense if need be."""
        return num_bytes <= self._memory_bytes

    def put(self, digest: str, copy: HostCopy) -> None:
        """Keep a copy, in place of less worthy ones; one that is larger than the budget is not kept."""
        if not self.has_room_for(copy.num_bytes):
            return
        with self._lock:
            self._drop(digest)
            while self._used + copy.num_bytes > self._memory_bytes:
                twice = [d for d in self._copies if self._on_device(d)]
                victim = self._eviction.victim(twice or self._copies, self._density)
                assert victim is not None, "bytes are used and no copy is there"
                self._eviction.evicted(victim, self._density(victim))
                self._used -= self._copies.pop(victim).num_bytes
            self._copies[digest] = copy
            self._used += copy.num_bytes
            self._eviction.use(digest)

    def drop(self, digest: str) -> None:
        """Forget a digest's copy, if there is one."""
        with self._lock:
            self._drop(digest)

    def stats(self) -> HostStats:
        """Return how much is kept, and how often it helped."""
        with self._lock:
            return HostStats(
                num_adapters=len(self._copies),
                num_bytes=self._used,
                num_hits=self._hits,
                num_misses=self._misses,
            )

    def _drop(self, digest: str) -> None:
        copy = self._copies.pop(digest, None)
        if copy is not None:
            self._used -= copy.num_bytes
            self._eviction.forget(digest)

    def _density(self, digest: str) -> float:
        num_bytes = self._copies[digest].num_bytes
        return self._times.seconds("registry", num_bytes) / num_bytes
