"""Held-out figures, the same functions for trainer, demo and nightly checks; higher is better, but for perplexity.

accuracy, exact, f1 and exact_match are shares of 1; rouge*, bleu and chrf are on the scale of 100.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.trainer.recipe import Metric

PRIMARY: dict[str, str] = {
    "accuracy": "accuracy",
    "rouge": "rougeL",
    "bleu": "bleu",
    "exact_match": "exact_match",
    "perplexity": "perplexity",
}


def score_texts(
    metric: Metric, predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Score generated texts against one reference each.

    Args:
        metric: ``rouge`` (rouge1, rouge2, rougeL: F-measure with stemming), ``bleu`` (bleu, chrf:
            of the corpus, sacrebleu's defaults) or ``exact_match``.
        predictions: what was generated.
        references: what was wanted, as many.
    """
    _check(predictions, references)
    if metric == "rouge":
        return _rouge(predictions, references)
    if metric == "bleu":
        import sacrebleu

        wanted = [list(references)]
        return {
            "bleu": sacrebleu.corpus_bleu(list(predictions), wanted).score,
            "chrf": sacrebleu.corpus_chrf(list(predictions), wanted).score,
        }
    return {"exact_match": exact(predictions, references)}


def score_labels(
    predictions: Sequence[str], generated: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
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
        "accuracy": exact(predictions, references),
        "f1": macro_f1(predictions, references),
        "exact": exact(generated, references),
    }


def exact(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that are the reference, outer white space aside."""
    pairs = zip(predictions, references, strict=True)
    return sum(p.strip() == r.strip() for p, r in pairs) / len(references)


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean over labels of 2 tp / (2 tp + fp + fn)."""
    scores = []
    for label in sorted(set(references) | set(predictions)):
        pairs = list(zip(predictions, references, strict=True))
        hits = sum(p == label and r == label for p, r in pairs)
        wrong = sum((p == label) != (r == label) for p, r in pairs)
        scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores)


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: 100 * sum(s[name].fmeasure for s in scores) / len(scores) for name in names}


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if not references or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
