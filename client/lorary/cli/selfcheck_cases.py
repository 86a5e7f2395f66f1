"""What ``lorary selfcheck`` asks, and when two answers to the same question are the same."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.client import AdapterInfo, GenerateResult

PROMPTS = (
    "The film was",
    "On the first day of the year the harbour was frozen, and nobody had told the ships. The captain",
    "Save your changes before you leave this page, or",
    "One, two, three, four,",
    "In the beginning there was a small house at the edge of the wood, and in the house lived an old woman "
    "with a cat, a clock that had stopped, and a letter that she had never opened. One morning she",
)
MAX_COMPOSITIONS = 4
TOP = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One question: who is asked, and what."""

    name: str
    prompt: str
    named: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """What came of one case: ``ok``, ``FAIL`` or ``skip``, and why."""

    result: str
    name: str
    detail: str


def make_cases(adapters: Sequence[AdapterInfo], limit: int) -> list[Case]:
    """Return base rows, single adapters, one of them scaled, and pairs of neighbours composed.

    Versions are named by number, so that an alias that moves in the middle changes nothing.
    """
    # What is on the device first, then by name; the newest version of each.
    newest = {a.name: a for a in sorted(adapters, key=lambda a: a.version)}
    chosen = sorted(newest.values(), key=lambda a: (a.residency != "resident", a.name))[:limit]
    refs = [f"{a.name}@{a.version}" for a in chosen]
    named: list[tuple[str, dict[str, Any]]] = [("base", {}), ("base", {})]
    named += [(ref, {"adapter": ref}) for ref in refs]
    named += [(f"{ref}*0.5", {"adapter": ref, "scale": 0.5}) for ref in refs[:1]]
    pairs = list(itertools.pairwise(refs))[:MAX_COMPOSITIONS]
    named += [(f"{a}*0.7+{b}*0.3", {"adapters": [(a, 0.7), (b, 0.3)]}) for a, b in pairs]
    return [
        Case(name, PROMPTS[i % len(PROMPTS)], arguments)
        for i, (name, arguments) in enumerate(named)
    ]


def difference(alone: GenerateResult, beside: GenerateResult, tie: float) -> str:
    """Return in what an answer given beside others differs from the one given alone; empty if in nothing.

    A different token is forgiven where the answer given alone held both to be likely alike, to ``tie`` nats:
    from there on the two answers have different texts before them and cannot be compared.
    """
    if alone.receipt.digest != beside.receipt.digest:
        return f"answered by {beside.receipt.digest[:23]}, alone by {alone.receipt.digest[:23]}"
    pairs = zip(alone.token_ids, beside.token_ids, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        if len(alone.token_ids) == len(beside.token_ids):
            return ""
        return f"{len(beside.token_ids)} tokens, alone {len(alone.token_ids)}"
    wanted, got = alone.token_ids[at], beside.token_ids[at]
    position = alone.logprobs[at]
    gap = position.chosen[1] - dict(position.top).get(got, float("-inf"))
    if gap <= tie:
        return ""
    return f"token {at} is {got}, alone {wanted}, {gap:.3g} nats likelier"
