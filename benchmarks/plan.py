"""What a serving benchmark measures; goes into every record."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SEED = 7
AGREEMENT_TOKENS = 32
"""Tokens of an answer when answers are compared."""


class Popularity(StrEnum):
    """How adapters are drawn."""

    uniform = "uniform"
    zipf = "zipf"
    distinct = "distinct"


class Through(StrEnum):
    """What Lorary is measured through."""

    engine = "engine"
    grpc = "grpc"
    both = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured; goes into every record."""

    base: str
    dtype: str
    threads: int
    adapters: tuple[int, ...]
    concurrency: tuple[int, ...]
    repeats: int
    contenders: tuple[str, ...]
    popularity: Popularity
    prompt_tokens: int
    new_tokens: int
    min_requests: int
    agreement_calls: int
    chosen_cells: tuple[tuple[int, int], ...] = ()
    rounds: int = 2
    interleave: bool = False

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """Adapters and requests at once: the chosen pairs, or all pairs."""
        if self.chosen_cells:
            return self.chosen_cells
        return tuple((k, c) for k in self.adapters for c in self.concurrency)

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Adapters, requests at once, and which repeat, in the order of the runs: cell by cell, or cells in turn."""
        repeats = range(self.repeats)
        if not self.interleave:
            return [(k, c, r) for k, c in self.cells for r in repeats]
        # There and back, so that none is always behind the same one.
        return [(k, c, r) for r in repeats for k, c in self.cells[:: -1 if r % 2 else 1]]

    def num_requests(self, concurrency: int) -> int:
        """Return the requests of one run: with two rounds some are sent into a full batch."""
        return max(self.min_requests, self.rounds * concurrency)

    @property
    def longest_answer(self) -> int:
        """Most tokens that any call asks for."""
        return max(self.new_tokens, AGREEMENT_TOKENS)

    def record(self) -> dict[str, Any]:
        """Return the part of every record that says how it was made."""
        from benchmarks.synthetic import RANK

        return {
            "base": self.base,
            "dtype": self.dtype,
            "threads": self.threads,
            "rank": RANK,
            "popularity": self.popularity.value,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "repeats": self.repeats,
            "min_requests": self.min_requests,
            "rounds": self.rounds,
            "interleave": self.interleave,
            "seed": SEED,
        }
