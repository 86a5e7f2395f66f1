"""The paired bootstrap against closed forms, scipy, and the corpus figures of the drawn rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from lorary.registry.manifest import Metrics
from lorary.trainer.bootstrap import Bootstrap, Sums
from lorary.trainer.figures_table import verdict
from lorary.trainer.metrics import f1_sums, label_sums, text_sums

RNG = np.random.default_rng(7)


def mean_of(values: np.ndarray) -> Sums:  # type: ignore[type-arg]
    parts = np.stack([values, np.ones(len(values))], axis=1)
    return Sums(parts=parts, figure=lambda sums: sums[:, 0] / sums[:, 1])


def test_intervals_of_a_mean_are_those_of_the_central_limit_theorem() -> None:
    """Half width 1.96 s / √n: for each side, and for the difference from its own, smaller, variance."""
    base = RNG.normal(0, 2, 400)
    adapter = base + RNG.normal(
        0.5, 0.3, 400
    )  # strongly correlated, as answers to one question are
    found = Bootstrap(num_resamples=4000).uncertainty(
        {"m": mean_of(adapter)}, {"m": mean_of(base)}
    )["m"]
    assert found.base is not None
    assert found.difference is not None
    for interval, values in (
        (found.adapter, adapter),
        (found.base, base),
        (found.difference, adapter - base),
    ):
        half = 1.96 * values.std() / math.sqrt(len(values))
        assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_difference_is_that_of_scipys_paired_bootstrap() -> None:
    base, adapter = RNG.random(60) < 0.4, RNG.random(60) < 0.6
    mine = Bootstrap(num_resamples=5000, confidence=0.9).uncertainty(
        {"m": mean_of(adapter.astype(float))}, {"m": mean_of(base.astype(float))}
    )["m"]
    theirs = scipy.stats.bootstrap(
        (adapter, base),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=5000,
        confidence_level=0.9,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert mine.difference is not None
    assert mine.difference.low == pytest.approx(theirs.low, abs=0.02)
    assert mine.difference.high == pytest.approx(theirs.high, abs=0.02)


def test_corpus_figures_of_a_resample_are_those_of_the_drawn_rows() -> None:
    """Sums weighted by counts give what sacrebleu and scikit-learn say of the rows themselves."""
    import sacrebleu
    from sklearn.metrics import f1_score

    words = ["le", "chat", "est", "sur", "tapis", "toit", "chien", "un", "grand"]
    wanted = [" ".join(RNG.choice(words, 7)) for _ in range(12)]
    said = [" ".join([*one.split()[:4], *RNG.choice(words, 3)]) for one in wanted]
    drawn = RNG.integers(0, 12, 12)
    weights = np.bincount(drawn, minlength=12)[None].astype(float)
    sums = text_sums("bleu", said, wanted)
    rows = [said[i] for i in drawn], [[wanted[i] for i in drawn]]
    for name, theirs in (
        ("bleu", sacrebleu.corpus_bleu(*rows).score),
        ("chrf", sacrebleu.corpus_chrf(*rows).score),
    ):
        one = sums[name]
        assert one.figure(weights @ one.parts)[0] == pytest.approx(theirs)
    labels = RNG.choice(["a", "b", "c"], 12).tolist(), RNG.choice(["a", "b", "c"], 12).tolist()
    f1 = f1_sums(*labels)
    theirs = f1_score([labels[1][i] for i in drawn], [labels[0][i] for i in drawn], average="macro")
    assert f1.figure(weights @ f1.parts)[0] == pytest.approx(theirs)


def test_a_side_compared_with_itself_differs_by_nothing() -> None:
    """Only pairs give this: independent resamples of equal sides differ by chance."""
    sums = label_sums(["a", "b", "a", "a"], ["a", "b", "", "a"], ["a", "a", "b", "a"])
    for one in Bootstrap(num_resamples=50).uncertainty(sums, sums).values():
        assert one.difference is not None
        assert (one.difference.low, one.difference.high) == (0, 0)


def test_a_requirement_may_name_ends_of_intervals_and_a_verdict_needs_zero_outside() -> None:
    right, wrong = mean_of(np.repeat([1.0, 0.0], [45, 5])), mean_of(np.repeat([1.0, 0.0], [20, 30]))
    sure = Bootstrap(seed=3).uncertainty({"accuracy": right}, {"accuracy": wrong})
    metrics = Metrics(
        primary="accuracy",
        num_examples=50,
        base={"accuracy": 0.4},
        adapter={"accuracy": 0.9},
        uncertainty=sure,
    )
    figures = metrics.figures()
    assert figures["accuracy.gain"] == pytest.approx(0.5)
    assert 0.3 < figures["accuracy.gain.low"] < 0.5 < figures["accuracy.gain.high"] < 0.7
    assert figures["accuracy.low"] < 0.9 < figures["accuracy.high"]
    assert verdict(metrics, "accuracy") == "better"
    lower = Metrics(
        primary="ece", num_examples=50, base={}, adapter={}, uncertainty={"ece": sure["accuracy"]}
    )
    assert verdict(lower, "ece") == "worse", "an error that grows is no gain"


def test_no_resamples_no_intervals() -> None:
    assert Bootstrap(num_resamples=0).uncertainty({"m": mean_of(np.ones(3))}, None) == {}
