"""Whether contenders answer rightly, before anybody asks how fast.

Two figures against PEFT in float32, one request at a time, on answers of the same length:

- *free running*: equal positions before the first difference. In bfloat16 near-ties fall either
  way, and one flip changes all that follows, so that even a right answer scores far below 1;
- *telling tokens*: the share of equal tokens, each after the oracle's own tokens, at the positions
  where the oracle with its adapter says something else than without. Flips do not add up there, and
  a contender that ignores or confuses adapters is near 0. Calls without an adapter are asked at
  every ``STRIDE``-th position.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.workload import Call, awake

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.contenders.peft_mixed import PeftMixed
    from benchmarks.workload import Contender

STRIDE = 8
ALLOWANCE = 0.20
"""How far below PEFT in the contenders' dtype the share may be: two standard errors of ~40 tokens."""
FLOOR = 0.50
"""The least share, whatever PEFT reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How one contender agrees with another. Shares are of positions, 0 to 1."""

    contender: str
    against: str
    free_running: float
    whole_answers: int
    num_answers: int
    telling_tokens: float | None

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)


def check_agreement(
    contenders: Sequence[Contender],
    oracle: PeftMixed,
    peer: PeftMixed,
    calls: Sequence[Call],
    *,
    new_tokens: int,
    said: Callable[[str], None],
) -> list[Agreement]:
    """Compare every contender with the oracle and the peer, and the bare base with the oracle.

    Args:
        contenders: who is measured, apart from the peer; all calls run at once. One that cannot
            answer for adapters is compared on the other calls.
        oracle: PEFT in float32; calls run one at a time.
        peer: PEFT in the contenders' dtype, all calls in one batch.
        calls: of several adapters and of none.
        new_tokens: tokens of each answer.
        said: told what is being done.
    """
    said("PEFT float32, one at a time")
    wanted = [t.token_ids for t in oracle.run(calls, concurrency=1, new_tokens=new_tokens)]
    said("PEFT mixed batch")
    batch = peer.run(calls, concurrency=len(calls), new_tokens=new_tokens)
    peers = [t.token_ids for t in batch]
    places = [_telling(oracle, c, a) for c, a in zip(calls, wanted, strict=True)]
    targets = [answer[i] for answer, at in zip(wanted, places, strict=True) for i in at]

    def forced(model: PeftMixed, *, with_adapter: bool = True) -> float:
        found: list[int] = []
        for call, answer, at in zip(calls, wanted, places, strict=True):
            tokens = model.next_tokens(call if with_adapter else _bare(call), answer)
            found += [tokens[i] for i in at]
        return _share(found, targets)

    found = [
        _compare("peft", "peft float32", peers, wanted, forced(peer)),
        _compare("base, no adapter", "peft float32", [], [], forced(oracle, with_adapter=False)),
    ]
    names = list(dict.fromkeys(call.adapter for call in calls if call.adapter is not None))
    for contender in contenders:
        asked = list(range(len(calls)))
        if not contender.can_answer(len(names)):
            asked = [i for i in asked if calls[i].adapter is None]
        said(contender.name)
        with awake(contender, names if len(asked) == len(calls) else []):
            found += _answers(
                contender,
                [(calls[i], wanted[i], peers[i], places[i]) for i in asked],
                new_tokens,
                said,
            )
    return found


def _answers(
    contender: Contender,
    asked: Sequence[tuple[Call, list[int], list[int], list[int]]],
    new_tokens: int,
    said: Callable[[str], None],
) -> list[Agreement]:
    """Compare a contender; ``asked``: a call, the oracle's answer, the peer's, telling positions."""
    calls, wanted, peers, _ = ([*column] for column in zip(*asked, strict=True))
    traces = contender.run(calls, concurrency=len(calls), new_tokens=new_tokens)
    answers = [t.token_ids for t in traces]
    targets = [answer[i] for _, answer, _, at in asked for i in at]
    steps = [
        Call(prompt_ids=(*call.prompt_ids, *answer[:i]), adapter=call.adapter)
        for call, answer, _, at in asked
        for i in at
    ]
    said(f"{contender.name}, telling tokens")
    ones = contender.run(steps, concurrency=len(calls), new_tokens=1)
    share = _share([t.token_ids[0] for t in ones], targets)
    return [
        _compare(contender.name, "peft float32", answers, wanted, share),
        _compare(contender.name, "peft", answers, peers, None),
    ]


def _bare(call: Call) -> Call:
    return Call(prompt_ids=call.prompt_ids, adapter=None)


def _telling(oracle: PeftMixed, call: Call, answer: Sequence[int]) -> list[int]:
    """Return the positions at which a call's next token is compared."""
    if call.adapter is None:
        return list(range(0, len(answer), STRIDE))
    without = oracle.next_tokens(_bare(call), answer)
    return [i for i, (a, b) in enumerate(zip(without, answer, strict=True)) if a != b]


def _share(found: Sequence[int], wanted: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def disagreements(found: Sequence[Agreement]) -> dict[str, str]:
    """Return a line for every contender that answers wrongly; empty when all answer rightly."""
    against = {a.contender: a.telling_tokens for a in found if a.telling_tokens is not None}
    least = max(FLOOR, against["peft"] - ALLOWANCE)
    return {
        name: f"{name} agrees with PEFT float32 on {share:.0%} of the telling tokens; at least {least:.0%} are "
        "needed (PEFT in the same dtype: "
        f"{against['peft']:.0%}). Its speed would be that of wrong answers."
        for name, share in against.items()
        if not name.startswith(("peft", "base")) and share < least
    }


def _compare(
    contender: str,
    against: str,
    answers: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    telling_tokens: float | None,
) -> Agreement:
    equal = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(y))
        for x, y in zip(answers, wanted, strict=True)
    ]
    total = sum(len(y) for y in wanted)
    return Agreement(
        contender=contender,
        against=against,
        free_running=sum(equal) / total if total else 0.0,
        whole_answers=sum(n == len(y) for n, y in zip(equal, wanted, strict=True)),
        num_answers=len(wanted),
        telling_tokens=telling_tokens,
    )
