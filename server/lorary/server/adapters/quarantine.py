"""Versions that must not be used, by digest, until somebody says otherwise.

A digest is content, so what was found wrong with it stays wrong under every name. Who asks for a
quarantined digest is refused at once, and no file is read again. An explicit load (``LoadAdapter``) lifts
it and tries anew; a push of other content is another digest and was never in here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.errors import LoraryError

MAX_QUARANTINED = 4096


class Quarantine:
    """Digests with the reason they are refused for; thread-safe.

    Args:
        limit: most digests remembered; the one that was put in first is forgotten first, and found out
            again when it is loaded.
    """

    def __init__(self, limit: int = MAX_QUARANTINED) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._reasons: OrderedDict[str, LoraryError] = OrderedDict()

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, digest: str) -> bool:
        return digest in self._reasons

    def add(self, digest: str, reason: LoraryError) -> None:
        """Refuse a digest from now on, for ``reason``."""
        with self._lock:
            self._reasons[digest] = reason
            if len(self._reasons) > self._limit:
                self._reasons.popitem(last=False)

    def check(self, digest: str) -> None:
        """Do nothing, unless the digest is in here.

        Raises:
            LoraryError: the reason it was put in for.
        """
        reason = self._reasons.get(digest)
        if reason is not None:
            # Without the frames of whoever was refused before: the same object is raised each time.
            raise reason.with_traceback(None)

    def lift(self, digest: str) -> bool:
        """Let a digest be tried again; return whether it was in here."""
        with self._lock:
            return self._reasons.pop(digest, None) is not None

    def digests(self) -> tuple[str, ...]:
        """Return what is in here, oldest first."""
        with self._lock:
            return tuple(self._reasons)
