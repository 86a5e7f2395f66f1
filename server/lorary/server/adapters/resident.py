"""One digest's record while it is on the device, on its way there, or failed a moment ago."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorary.errors import LoraryError
    from lorary.registry import Resolved
    from lorary.server.adapters.segments import PoolEntry

State = Literal["loading", "resident", "unloading", "failed"]


@dataclass(slots=True, eq=False)
class Resident:
    """What the residency knows of one digest; every field is guarded by its lock.

    Attributes:
        num_holders: leases that hold it.
        num_waiters: callers of ``Residency.load`` that wait for it.
        is_prefetched: somebody asked for it to be here before anybody needs it: it is loaded although nobody
            waits, as long as there is memory that nobody holds.
        may_evict: others may have to go for it; not for a load that nobody has asked for yet.
        is_copying: its pages are being copied to host memory, and must stay until that is done.
    """

    resolved: Resolved
    state: State = "loading"
    pages: tuple[int, ...] = ()
    entry: PoolEntry | None = None
    rank: int = 0
    pinned: bool = False
    num_holders: int = 0
    num_waiters: int = 0
    is_prefetched: bool = False
    may_evict: bool = True
    is_copying: bool = False
    last_used_s: float = 0.0
    ready_ns: int = 0
    error: LoraryError | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_wanted(self) -> bool:
        """Whether anybody would miss it: who holds it, waits for it, or has pinned it."""
        return bool(self.num_holders or self.num_waiters or self.pinned)

    @property
    def is_free(self) -> bool:
        """Whether its pages may be taken: it is on the device and nothing reads them."""
        return self.entry is not None and not self.num_holders and not self.is_copying


@dataclass(frozen=True, slots=True, kw_only=True)
class HotAdapter:
    """A version that is, or was, on the device, and how often it was used of late."""

    resolved: Resolved
    pinned: bool
    uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentAdapter:
    """A version's state, for people."""

    name: str
    version: int
    digest: str
    state: State
    pinned: bool
    rank: int
    device_bytes: int
    num_holders: int
    num_pages: int = 0
    storage_error: float = 0.0
    """Largest relative error of a module's B·A that keeping it in fewer bits has brought."""
