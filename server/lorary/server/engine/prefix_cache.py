"""Prompts that begin as another one did, with the same adapter, need not be read again; no torch.

What a slot held stays there until the slot is needed, so the cache costs no memory of its own: a new
prompt looks for the longest beginning it shares with a free slot's contents or with a running answer.
It takes the free slot over, or gets the shared positions copied into its own. Keys and values depend on
the adapter, so beginnings are shared only within one digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Tokens

    from lorary.server.engine.sequence import Sequence

LEAST_SHARED = 16
"""Shorter beginnings are read again: finding and copying them is not free."""
WORTH_WAITING = 64
"""A prompt waits for another one that is being read when it then saves at least this many tokens."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Where a new sequence goes.

    Attributes:
        slot: the free slot it takes.
        source: the slot whose first ``length`` positions are its own beginning; may be ``slot``.
        length: positions that need not be computed; 0 when nothing is shared.
    """

    slot: int
    source: int
    length: int


class PrefixCache:
    """What free slots hold; the engine thread's alone.

    Invariant: ``keep`` is called for free slots only, and a slot that is claimed is forgotten.
    """

    def __init__(self) -> None:
        # Least recently used first.
        self._kept: dict[int, tuple[str, list[int]]] = {}

    def keep(self, slot: int, digest: str, tokens: list[int]) -> None:
        """Remember that a slot just given back holds ``tokens`` as the adapter ``digest`` saw them."""
        self._kept.pop(slot, None)
        if len(tokens) >= LEAST_SHARED:
            self._kept[slot] = (digest, tokens)

    def claim(
        self, sequence: Sequence, running: Iterable[Sequence], free: Iterable[int]
    ) -> Claim | None:
        """Choose a slot for ``sequence`` among ``free``, which is not empty, and forget what it held.

        Returns:
            The claim, or None when it is better to wait until a running prompt has been read.
        """
        digest, prompt = sequence.request.lease.digest, sequence.request.prompt_ids
        # The last token is always read: its logits choose the answer's first one.
        limit = len(prompt) - 1
        source, length, coming = -1, 0, 0
        for slot, (kept_digest, tokens) in self._kept.items():
            if kept_digest == digest:
                shared = common_length(tokens, prompt, limit)
                if shared > length:
                    source, length = slot, shared
        for other in running:
            if other.request.lease.digest == digest:
                shared = common_length(other.token_ids, prompt, limit)
                there = min(shared, other.num_computed)
                if there > length:
                    source, length = other.slot, there
                if other.is_prefilling:
                    coming = max(coming, min(shared, other.num_prompt))
        if coming >= length + WORTH_WAITING:
            return None
        if length < LEAST_SHARED:
            source, length = -1, 0
        slot = self._choose(source, length, free)
        self._kept.pop(slot, None)
        return Claim(slot, source if length else slot, length)

    def _choose(self, source: int, length: int, free: Iterable[int]) -> int:
        """Return the source where it loses nothing, else an empty slot, else the oldest one."""
        kept = self._kept.get(source)
        if kept is not None and len(kept[1]) == length:
            return source
        empty = [slot for slot in free if slot not in self._kept]
        if empty:
            return min(empty)
        oldest = [slot for slot in self._kept if slot != source]
        return oldest[0] if oldest else source


def common_length(a: Tokens[int], b: Tokens[int], limit: int) -> int:
    """Return how many tokens at the front are the same, at most ``limit``."""
    high = min(len(a), len(b), limit)
    if high <= 0:
        return 0
    if list(a[:high]) == list(b[:high]):
        return high
    low = 0
    while high - low > 1:
        # The first `low` are the same; some of the first `high` are not.
        middle = (low + high) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle
    return low
