r"""Which calls of an alias its canary answers, and which it gets a copy of: by a hash of the caller's key.

The same key always gets the same answer, on every server and in every language::

    share(key) = first 8 bytes of blake2b(seed \0 key), as a big-endian fraction, times 100
    canary     if share < percent, with seed = "canary \0 name \0 alias \0 version"
    copy       if not canary and share < shadow, with seed = "shadow \0 name \0 alias \0 version"

The percent is not in the seed, so that a canary that grows keeps the callers that it has.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

from lorary.server.rollout.gates import Copies, Tally, judge

if TYPE_CHECKING:
    from lorary.registry.splits import Split
    from lorary.server.rollout.gates import Verdict
    from lorary.server.targets import Target

State = Literal["loading", "running", "failed", "passed"]


def share(seed: str, key: str) -> float:
    """Return where a key lies between 0 and 100; the module's first lines have the formula."""
    hashed = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64 * 100


class Trial:
    """One canary on this server; on the event loop.

    Args:
        name: the adapter.
        split: what the alias log says.

    Attributes:
        state: ``loading`` until the candidate is on the device; ``failed`` or ``passed`` once judged.
            It gets calls while ``is_open``.
        candidate: what answers.
        problem: why it is not running, or why its end could not be written.
        holder, canary: what the two sides' calls came to.
        copies: what its copies came to.
    """

    def __init__(self, name: str, split: Split) -> None:
        self.name = name
        self.split = split
        self.state: State = "loading"
        self.candidate: Target | None = None
        self.problem = ""
        self.holder = Tally()
        self.canary = Tally()
        self.copies = Copies()
        place = f"{name}\0{split.alias}\0{split.canary.version}"
        self._canary_seed = f"canary\0{place}"
        self._shadow_seed = f"shadow\0{place}"

    @property
    def place(self) -> str:
        """The alias, for people."""
        return f"{self.name}@{self.split.alias}"

    @property
    def is_open(self) -> bool:
        """Whether it gets calls: it runs, or has passed and the alias has not turned yet."""
        return self.state in ("running", "passed")

    def takes(self, key: str) -> bool:
        """Whether the canary answers the call with this key."""
        return self.is_open and share(self._canary_seed, key) < self.split.canary.percent

    def copies_call(self, key: str) -> bool:
        """Whether the canary gets a copy of a call that its holder answers."""
        shadow = self.split.canary.shadow
        return bool(shadow) and self.is_open and share(self._shadow_seed, key) < shadow

    def judge(self) -> Verdict:
        """Return what the gates say now."""
        return judge(self.split.canary, self.holder, self.canary, self.copies)
