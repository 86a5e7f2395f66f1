"""Held-out examples side by side: which the adapter won, which it lost, which stayed the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.registry.manifest import is_lower_better

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.examples import Example

# BLEU of one short sentence is nearly always 0 or 100; chrF tells better from worse.
_BY_EXAMPLE = {"bleu": "chrf"}
_SAME = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one model said to one example, and its score; ``None`` where there is none by example."""

    text: str
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One example with both answers.

    Attributes:
        index: of the example among those held out.
        inputs: of its prompt.
        target: the answer wanted.
        base: ``None`` where it was not measured.
        adapter: the adapter's answer.
    """

    index: int
    inputs: Mapping[str, str]
    target: str
    base: Side | None
    adapter: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """All pairs by who was better, the clearest first.

    Attributes:
        metric: by which they were compared.
        groups: ``won``, ``lost`` and ``same``; without a base, ``all``.
    """

    metric: str
    groups: Mapping[str, Sequence[Pair]]


def compare_examples(
    test: Sequence[Example], before: Evaluation | None, after: Evaluation, primary: str
) -> Outcomes:
    """Sort held-out examples by how much better the adapter's answer is than the base's."""
    metric = _BY_EXAMPLE.get(primary, primary)
    adapter = _scores(after, metric)
    if before is None:
        pairs = [_pair(test, None, after, i, None, adapter) for i in range(len(test))]
        return Outcomes(metric=metric, groups={"all": pairs})
    base = _scores(before, metric)
    gains = [
        a - b for a, b in zip(_known(adapter, after, test), _known(base, before, test), strict=True)
    ]
    if is_lower_better(metric):
        gains = [-gain for gain in gains]
    order = sorted(range(len(test)), key=lambda i: -abs(gains[i]))
    groups: dict[str, list[Pair]] = {"won": [], "lost": [], "same": []}
    for i in order:
        name = "same" if abs(gains[i]) < _SAME else "won" if gains[i] > 0 else "lost"
        groups[name].append(_pair(test, before, after, i, base, adapter))
    return Outcomes(metric=metric, groups=groups)


def example_rows(
    test: Sequence[Example], before: Evaluation | None, after: Evaluation
) -> list[dict[str, Any]]:
    """Return one row per held-out example, as ``examples.jsonl`` has them."""
    rows = []
    for i, example in enumerate(test):
        answers = {"adapter": after} if before is None else {"base": before, "adapter": after}
        rows.append(
            {
                "inputs": dict(example.inputs),
                "target": example.target,
                "prediction": {name: one.predictions[i] for name, one in answers.items()},
                "generated": {name: one.generated[i] for name, one in answers.items()},
            }
        )
    return rows


def _scores(evaluation: Evaluation, metric: str) -> list[float] | None:
    sums = evaluation.sums.get(metric)
    return None if sums is None else [float(value) for value in sums.by_example]


def _known(
    scores: list[float] | None, evaluation: Evaluation, test: Sequence[Example]
) -> list[float]:
    """Return the scores; where a metric has none by example, whether the answer is the wanted one."""
    if scores is not None:
        return scores
    pairs = zip(evaluation.predictions, test, strict=True)
    return [float(text.strip() == example.target.strip()) for text, example in pairs]


def _pair(
    test: Sequence[Example],
    before: Evaluation | None,
    after: Evaluation,
    i: int,
    base: list[float] | None,
    adapter: list[float] | None,
) -> Pair:
    return Pair(
        index=i,
        inputs=dict(test[i].inputs),
        target=test[i].target,
        base=None if before is None else _side(before, i, base),
        adapter=_side(after, i, adapter),
    )


def _side(evaluation: Evaluation, i: int, scores: list[float] | None) -> Side:
    text = evaluation.predictions[i]
    if evaluation.label_probabilities:
        text = f"{text} ({max(evaluation.label_probabilities[i]):.0%})"
    return Side(text=text, score=None if scores is None else scores[i])
