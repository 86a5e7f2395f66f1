"""Held-out figures, the same functions for trainer, ``lorary eval``, demo and nightly checks.

Each is a ``Sums``: what every example adds to a few sums, and the figure that the sums make
(``lorary.trainer.bootstrap``), so that the very same thing is reported and resampled.

accuracy, exact, f1, exact_match, mrr, recall* and ece are shares of 1; rouge*, bleu and chrf are on the scale of 100. Higher
is better, but for perplexity and ece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorary.registry.manifest import Metrics
from lorary.trainer.bootstrap import Bootstrap, Sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lorary.trainer.bootstrap import Floats
    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.recipe import Metric, Recipe

PRIMARY: dict[str, str] = {
    "accuracy": "accuracy",
    "rouge": "rougeL",
    "bleu": "bleu",
    "exact_match": "exact_match",
    "perplexity": "perplexity",
}
_PRIMARY_OF_KIND = {"token_classification": "f1", "embeddings": "mrr"}
NUM_BINS = 10
"""Of confidence, equally wide, for ``ece`` and the reliability diagram."""
_MAX_NATS = 690.0  # exp of more is no number that a manifest can hold


def primary_of(recipe: Recipe) -> str:
    """Return the figure that stands for all of a recipe's."""
    return _PRIMARY_OF_KIND.get(recipe.task.kind) or PRIMARY[recipe.metric]


def metrics_of(recipe: Recipe, before: Evaluation | None, after: Evaluation, seed: int) -> Metrics:
    """Return the figures of base and adapter as a manifest has them, with their intervals."""
    bootstrap = Bootstrap(
        num_resamples=recipe.evaluation.num_resamples,
        confidence=recipe.evaluation.confidence,
        seed=seed,
    )
    return Metrics(
        primary=primary_of(recipe),
        num_examples=len(after.predictions),
        base=before.metrics if before else {},
        adapter=after.metrics,
        uncertainty=bootstrap.uncertainty(after.sums, before.sums if before else None),
        confidence=recipe.evaluation.confidence,
    )


def score_texts(
    metric: Metric, predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Score generated texts against one reference each: the values of ``text_sums``."""
    found = text_sums(metric, predictions, references)
    return {name: sums.value for name, sums in found.items()}


def score_labels(
    predictions: Sequence[str], generated: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Score a classification: the values of ``label_sums``."""
    found = label_sums(predictions, generated, references)
    return {name: sums.value for name, sums in found.items()}


def text_sums(
    metric: Metric, predictions: Sequence[str], references: Sequence[str]
) -> dict[str, Sums]:
    """Score generated texts against one reference each.

    Args:
        metric: ``rouge`` (rouge1, rouge2, rougeL: F-measure with stemming, mean over examples),
            ``bleu`` (bleu, chrf: of the corpus, sacrebleu's defaults) or ``exact_match``.
        predictions: what was generated.
        references: what was wanted, as many.
    """
    _check(predictions, references)
    if metric == "rouge":
        return _rouge(predictions, references)
    if metric == "bleu":
        return _bleu(predictions, references)
    return {"exact_match": mean_sums(_is_same(predictions, references))}


def label_sums(
    predictions: Sequence[str], generated: Sequence[str], references: Sequence[str]
) -> dict[str, Sums]:
    """Score a classification.

    Args:
        predictions: the likeliest label of each example.
        generated: what came out when nothing but the prompt was given.
        references: the true labels.

    Returns:
        accuracy and macro-F1 of the predictions, and ``exact`` of the generated texts.
    """
    _check(predictions, references)
    return {
        "accuracy": mean_sums(_is_same(predictions, references)),
        "f1": f1_sums(predictions, references),
        "exact": mean_sums(_is_same(generated, references)),
    }


def exact(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that are the reference, outer white space aside."""
    return mean_sums(_is_same(predictions, references)).value


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the value of ``f1_sums``."""
    return f1_sums(predictions, references).value


def f1_sums(predictions: Sequence[str], references: Sequence[str]) -> Sums:
    """Return macro-F1: the mean of 2 tp / (2 tp + fp + fn) over the labels that occur on either side."""
    labels = sorted(set(references) | set(predictions))
    column = {label: k for k, label in enumerate(labels)}
    # By label: how often it was right, how often it was predicted or true (both count).
    parts = np.zeros((len(references), 2, len(labels)))
    for i, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        parts[i, 0, column[true]] = predicted == true
        parts[i, 1, column[true]] += 1
        parts[i, 1, column[predicted]] += 1

    def figure(sums: Floats) -> Floats:
        hits, seen = sums[:, : len(labels)], sums[:, len(labels) :]
        scores = 2 * hits / np.maximum(seen, 1)
        found: Floats = scores.sum(axis=1) / (seen > 0).sum(axis=1)
        return found

    return Sums(parts=parts.reshape(len(references), -1), figure=figure)


def perplexity_sums(nats: Sequence[float], num_tokens: Sequence[int]) -> Sums:
    """Return the perplexity of the wanted answers: exp(nats / tokens), over all tokens of all examples.

    A long answer weighs more than a short one: a mean of the examples' own perplexities would be
    another figure, and one that a single odd example can rule.

    Args:
        nats: negative log likelihood of each answer and its end, prompts not counted.
        num_tokens: of each answer, its end included.
    """
    parts = np.stack([np.asarray(nats, float), np.asarray(num_tokens, float)], axis=1)
    return Sums(
        parts=parts, figure=lambda sums: np.exp(np.minimum(sums[:, 0] / sums[:, 1], _MAX_NATS))
    )


def calibration_sums(confidences: Sequence[float], is_right: Sequence[bool]) -> Sums:
    """Return the expected calibration error, with ``NUM_BINS`` bins.

    The sum over bins of share × |accuracy - mean confidence|: Guo et al., *On Calibration of Modern
    Neural Networks* (arXiv 1706.04599), equation 3. Its resamples lie a little high, because chance makes an
    absolute value larger, never smaller.

    Args:
        confidences: the probability of the predicted label, among all labels.
        is_right: whether that label was the true one.
    """
    bins = bin_of(confidences)
    parts = np.zeros((len(bins), NUM_BINS + 1))
    parts[np.arange(len(bins)), bins] = np.asarray(is_right, float) - np.asarray(confidences)
    parts[:, NUM_BINS] = 1
    return Sums(
        parts=parts,
        figure=lambda sums: np.abs(sums[:, :NUM_BINS]).sum(axis=1) / sums[:, NUM_BINS],
    )


def bin_of(confidences: Sequence[float]) -> NDArray[np.int64]:
    """Return the bin of each confidence; 1 is in the last one."""
    found = np.floor(np.asarray(confidences, float) * NUM_BINS).astype(np.int64)
    clipped: NDArray[np.int64] = np.minimum(found, NUM_BINS - 1)
    return clipped


def reliability(confidences: Sequence[float], is_right: Sequence[bool]) -> list[dict[str, float]]:
    """Return the bins of a reliability diagram that hold examples.

    Returns:
        ``low`` and ``high`` of the bin, ``count``, mean ``confidence`` and ``accuracy``.
    """
    bins = bin_of(confidences)
    sure, right = np.asarray(confidences, float), np.asarray(is_right, float)
    return [
        {
            "low": k / NUM_BINS,
            "high": (k + 1) / NUM_BINS,
            "count": int((bins == k).sum()),
            "confidence": round(float(sure[bins == k].mean()), 4),
            "accuracy": round(float(right[bins == k].mean()), 4),
        }
        for k in range(NUM_BINS)
        if (bins == k).any()
    ]


def confusion(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> list[list[int]]:
    """Return how often each true label (row) was taken for each label (column)."""
    column = {label: k for k, label in enumerate(labels)}
    found = [[0] * len(labels) for _ in labels]
    for predicted, true in zip(predictions, references, strict=True):
        found[column[true]][column[predicted]] += 1
    return found


def _is_same(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Tell which predictions are the reference, outer white space aside."""
    pairs = zip(predictions, references, strict=True)
    return [p.strip() == r.strip() for p, r in pairs]


def mean_sums(values: Sequence[float]) -> Sums:
    """Return the mean of one score per example."""
    parts = np.stack([np.asarray(values, float), np.ones(len(values))], axis=1)
    return Sums(parts=parts, figure=lambda sums: sums[:, 0] / sums[:, 1])


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: mean_sums([100 * s[name].fmeasure for s in scores]) for name in names}


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    """Return BLEU and chrF of the corpus, from sacrebleu's own counts of each sentence.

    Its ``corpus_score`` adds these counts up and does the rest; so do its own significance tests.
    """
    from sacrebleu.metrics import BLEU, CHRF

    def sums_of(metric: BLEU | CHRF) -> Sums:
        counts = metric._extract_corpus_statistics(list(predictions), [list(references)])

        def figure(sums: Floats) -> Floats:
            return np.array([metric._compute_score_from_stats(list(one)).score for one in sums])

        return Sums(parts=np.asarray(counts, float), figure=figure)

    return {"bleu": sums_of(BLEU()), "chrf": sums_of(CHRF())}


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if not references or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
