"""What is asked of every contender: the same prompts, adapters and order, and what they answer."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

Popularity = Literal["uniform", "zipf", "distinct"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request: token ids, and the adapter's name (None: the bare base)."""

    prompt_ids: tuple[int, ...]
    adapter: str | None


@dataclass(slots=True)
class Trace:
    """One answer: when it was asked for and when each token came, in ``time.perf_counter``.

    ``num_cached`` tokens of its prompt were not read again, and ``num_above`` further ones only by the
    layers behind the shared ones, where the contender tells.
    """

    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    num_cached: int = 0
    num_above: int = 0


class Contender(Protocol):
    """Something that answers calls."""

    name: str
    """What the table calls it."""

    def can_answer(self, num_adapters: int) -> bool:
        """Return whether it takes part where calls are for that many adapters (0: the bare base)."""
        return True

    def prepare(self, adapters: Sequence[str]) -> None:
        """Make adapters resident, so that no run pays for a load."""
        ...

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        """Answer every call, ``concurrency`` at a time, each with exactly ``new_tokens`` tokens."""
        ...

    def rest(self) -> None:
        """Take no processor time until it is prepared again: others are measured meanwhile."""
        return

    def close(self) -> None:
        """Give everything back."""
        ...


@contextmanager
def awake(contender: Contender, adapters: Sequence[str]) -> Iterator[None]:
    """Have a contender ready to answer for these adapters, and at rest afterwards."""
    contender.prepare(adapters)
    try:
        yield
    finally:
        contender.rest()


class Prompts:
    """Windows of a text, none of which begins where another does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
        self._ids: list[int] = tokenizer(source.read_text(), verbose=False)["input_ids"]

    def take(self, count: int, length: int, rng: random.Random) -> list[tuple[int, ...]]:
        """Return ``count`` prompts of ``length`` tokens each.

        Raises:
            ValueError: the text is too short for that many.
        """
        starts = len(self._ids) - length
        if count > starts:
            raise ValueError(f"the text has {starts} windows of {length} tokens; {count} asked for")
        return [tuple(self._ids[s : s + length]) for s in rng.sample(range(starts), count)]


def choose(
    adapters: Sequence[str], count: int, popularity: Popularity, rng: random.Random
) -> list[str | None]:
    """Return the adapter of each of ``count`` calls.

    ``uniform`` draws, ``zipf`` draws the k-th with weight 1/k, ``distinct`` takes turns, which is
    the hardest mix.
    """
    if not adapters:
        return [None] * count
    if popularity == "distinct":
        return [adapters[i % len(adapters)] for i in range(count)]
    weights = [1.0 if popularity == "uniform" else 1 / (k + 1) for k in range(len(adapters))]
    return list(rng.choices(list(adapters), weights, k=count))
