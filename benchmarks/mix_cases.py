"""The cases of ``mixes``: which adapters there are, which are asked for, which are there at the start.

- ``known``: ``NUM_KNOWN`` adapters in the registry, drawn by Zipf's law with exponent 1, and adapter
  memory for ``NUM_FITTING`` of rank ``RANK``. A run begins with the most popular ones resident, as
  many as fit; all others are loaded while it runs, from the disk (the system's copies of the files
  are dropped before each run). All that the runs ask for have rank 16 and random numbers of their
  own, so no two share a file. The draws are known beforehand: the adapters that nobody ever asks
  for are small (rank 1 on one kind of layer), which saves 8 GB of disk and changes no run.
- ``resident``: the same traffic over 32 of them, all resident: Zipf's law over fewer names.
- ``mixed ranks``: ``NUM_RANKED`` adapters, as many of each rank in ``MIXED``, asked for in turn.
- ``one rank``: as many adapters of the mean of these ranks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.library import Member
from benchmarks.plan import SEED
from benchmarks.synthetic import RANK
from benchmarks.workload import Call, choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.workload import Popularity, Prompts

NUM_KNOWN = 1000
NUM_FITTING = 64
NUM_RESIDENT = 32
NUM_RANKED = 32
MIXED = (8, 16, 32, 64)
MEAN_RANK = sum(MIXED) // len(MIXED)
_NEVER_ASKED = ("q_proj",)
KNOWN, RESIDENT, MIXED_RANKS, ONE_RANK = "known", "resident", "mixed ranks", "one rank"


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of traffic: adapters by popularity, how they are drawn, how many are there at first."""

    name: str
    adapters: tuple[str, ...]
    popularity: Popularity
    num_preloaded: int
    is_cold: bool = False

    def draw(self, repeat: int, count: int) -> list[str]:
        """Return the adapter of each call of one run; always the same for the same repeat."""
        rng = random.Random(f"{SEED}/{self.name}/{repeat}")
        return [name for name in choose(self.adapters, count, self.popularity, rng) if name]


def cases() -> list[Case]:
    """Return all cases, those to be compared beside each other."""
    known = tuple(f"known-{k:04d}" for k in range(NUM_KNOWN))
    mixed = tuple(f"mixed-{k:02d}" for k in range(NUM_RANKED))
    one = tuple(f"one-{k:02d}" for k in range(NUM_RANKED))
    return [
        Case(KNOWN, known, "zipf", NUM_FITTING, is_cold=True),
        Case(RESIDENT, known[:NUM_RESIDENT], "zipf", NUM_RESIDENT),
        Case(MIXED_RANKS, mixed, "distinct", NUM_RANKED),
        Case(ONE_RANK, one, "distinct", NUM_RANKED),
    ]


def members(chosen: Sequence[Case], *, repeats: int, num_calls: int) -> list[Member]:
    """Return every adapter that the cases know, with its rank."""
    made: dict[str, Member] = {}
    for case in chosen:
        asked = {name for r in range(repeats) for name in case.draw(r, num_calls)}
        asked.update(case.adapters[: case.num_preloaded])
        for index, name in enumerate(case.adapters):
            rank = {MIXED_RANKS: MIXED[index % len(MIXED)], ONE_RANK: MEAN_RANK}.get(
                case.name, RANK
            )
            seed = len(made)
            if name in made:
                continue
            if name in asked:
                made[name] = Member(name, rank, seed)
            else:
                made[name] = Member(name, 1, seed, _NEVER_ASKED)
    return list(made.values())


def calls(
    case: Case, prompts: Prompts, *, repeat: int, count: int, prompt_tokens: int
) -> list[Call]:
    """Return one run's calls; the prompts are the same in every case."""
    texts = prompts.take(count, prompt_tokens, random.Random(f"{SEED}/prompts/{repeat}"))
    chosen = case.draw(repeat, count)
    return [Call(prompt_ids=p, adapter=a) for p, a in zip(texts, chosen, strict=True)]
