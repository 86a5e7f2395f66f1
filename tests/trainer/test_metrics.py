"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from lorary.trainer.metrics import (
    PRIMARY,
    calibration_sums,
    confusion,
    f1_sums,
    perplexity_sums,
    reliability,
    score_labels,
    score_texts,
)


def test_accuracy_f1_and_exact() -> None:
    references = ["a", "a", "b", "b"]
    scores = score_labels(["a", "b", "b", "b"], [" a\n", "x", "b", "b b"], references)
    assert scores["accuracy"] == 0.75
    assert scores["exact"] == 0.5
    # a: tp 1, fn 1 -> 2/3; b: tp 2, fp 1 -> 4/5
    assert scores["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_label_never_predicted_counts_as_zero() -> None:
    assert f1_sums(["a", "a"], ["a", "b"]).value == pytest.approx((2 / 3 + 0) / 2)


def test_rouge() -> None:
    # "the cat sat" / "the cat ran": 2 of 3 words, 1 of 2 pairs, longest common 2 of 3
    scores = score_texts("rouge", ["the cat sat"], ["the cat ran"])
    assert scores["rouge1"] == pytest.approx(100 * 2 / 3)
    assert scores["rouge2"] == pytest.approx(100 / 2)
    assert scores["rougeL"] == pytest.approx(100 * 2 / 3)
    assert score_texts("rouge", [""], ["the cat"])["rougeL"] == 0


def test_bleu() -> None:
    sentence = "le chat est sur le tapis"
    assert score_texts("bleu", [sentence], [sentence])["bleu"] == pytest.approx(100)
    # 5 of 6 words, 4 of 5, 3 of 4, 2 of 3 n-grams, no brevity penalty
    scores = score_texts("bleu", ["le chat est sur le toit"], [sentence])
    assert scores["bleu"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert 0 < scores["chrf"] < 100


def test_exact_match_ignores_outer_white_space() -> None:
    assert score_texts("exact_match", [" a ", "b"], ["a", "c"]) == {"exact_match": 0.5}


def test_every_metric_has_a_primary_figure() -> None:
    for metric in ("rouge", "bleu", "exact_match"):
        assert PRIMARY[metric] in score_texts(metric, ["a b c d"], ["a b c d"])  # type: ignore[arg-type]
    assert PRIMARY["accuracy"] in score_labels(["a"], ["a"], ["a"])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score_texts("bleu", ["a"], ["a", "b"])


def test_perplexity_weighs_tokens_and_not_examples() -> None:
    # 3 tokens at 1/2 and 1 token at 1/16: exp((3 ln 2 + ln 16) / 4) = 2 ** (7 / 4)
    found = perplexity_sums([3 * math.log(2), math.log(16)], [3, 1])
    assert found.value == pytest.approx(2**1.75)
    assert found.by_example == pytest.approx([2, 16])
    assert perplexity_sums([1e9], [1]).value < 1e300, "a manifest holds no infinity"


def test_calibration_error_is_the_weighted_gap_of_its_bins() -> None:
    confidences, is_right = [0.95, 0.91, 0.55, 1.0], [True, False, True, True]
    # The last bin: 2 of 3 right, mean confidence 2.86 / 3; the sixth: 1 of 1, 0.55.
    gaps = 0.75 * abs(2 / 3 - 2.86 / 3) + 0.25 * abs(1 - 0.55)
    assert calibration_sums(confidences, is_right).value == pytest.approx(gaps)
    low, high = reliability(confidences, is_right)
    assert (low["count"], low["accuracy"], low["confidence"]) == (1, 1, 0.55)
    assert (high["low"], high["count"], high["accuracy"]) == (0.9, 3, 0.6667)


def test_confusion_has_true_labels_in_rows() -> None:
    assert confusion(["a", "b", "b"], ["a", "a", "b"], ["a", "b"]) == [[1, 1], [0, 1]]
