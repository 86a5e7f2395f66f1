"""Drafts by prompt lookup: what followed the last few tokens before may follow again; no torch.

Answers that repeat their input (extraction, summaries, edits, quotations) often continue as the text
did where the same tokens stood (Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023,
arXiv:2304.04487). A step then reads the drafted tokens beside the next one and keeps those that would
have been chosen anyway: answers are the same, only steps are fewer. It pays where a step costs nearly
the same for few rows as for one: decoding that is bound by the bytes of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GRAM = 3
"""Tokens that must be the same: fewer find more places, most of them wrong."""
MOST = 6
"""Tokens of a draft at most."""
PATIENCE = 3
"""Drafts in a row of which nothing was kept, before a sequence pauses."""
PAUSE = 24
"""Tokens for which it then drafts nothing."""


@dataclass(slots=True)
class Drafter:
    """Drafts for one sequence.

    Attributes:
        length: tokens of the next draft at most; grows while drafts are kept, shrinks while not.
    """

    length: int = MOST // 2
    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    _num_indexed: int = GRAM - 1
    _num_missed: int = 0
    _paused_until: int = 0

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        """Return what followed the last ``GRAM`` tokens before, at most ``limit``; often nothing."""
        # Of every place but the last, whose continuation is what is asked for.
        for end in range(self._num_indexed + 1, len(tokens)):
            self._ends[tuple(tokens[end - GRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)
        if len(tokens) < self._paused_until:
            return []
        start = self._ends.get(tuple(tokens[-GRAM:]))
        if start is None:
            return []
        return tokens[start : start + max(0, min(limit, self.length))]

    def learn(self, num_drafted: int, num_kept: int, num_tokens: int) -> None:
        """Take in how a draft went; ``num_tokens`` is the sequence's length now."""
        if num_kept == num_drafted:
            self.length = min(MOST, self.length + 1)
        elif num_kept == 0:
            self.length = max(1, self.length - 1)
        self._num_missed = 0 if num_kept else self._num_missed + 1
        if self._num_missed >= PATIENCE:
            self._num_missed = 0
            self._paused_until = num_tokens + PAUSE
