"""What ``kinds`` trains: for every task kind a base, rows and a short recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.capitals import LABELS

if TYPE_CHECKING:
    from collections.abc import Mapping

MINILM = "all-MiniLM-L6-v2"
PAIR = f"{MINILM}, twice"
SMOLLM = "smollm2-135m"
_REVIEWS = {"source": "movie-reviews", "num_test": 200, "num_validation": 32}
_JUPYTER = {"source": "jupyter-fr", "num_validation": 32}
_SENTIMENT = ["negative", "positive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCase:
    """One row of the table.

    Attributes:
        base: what the base is called; ``kind_bases`` has it.
        data: what a row is, and what is asked of it, for people.
        recipe: keys of the recipe beside name and base, as YAML would have them.
    """

    base: str
    data: str
    recipe: Mapping[str, Any]


CASES: dict[str, KindCase] = {
    "generation": KindCase(
        base=SMOLLM,
        data="Jupyter's interface texts: from English to French",
        recipe={
            "task": {
                "kind": "generation",
                "template": "<|im_start|>user\nFrench: {{ text }}<|im_end|>\n<|im_start|>assistant\n",
                "max_new_tokens": 32,
            },
            "data": {**_JUPYTER, "min_words": 4, "num_test": 64},
            "training": {"max_steps": 40, "learning_rate": 2e-3},
            "evaluation": {"metric": "bleu"},
        },
    ),
    "classification": KindCase(
        base=SMOLLM,
        data="film reviews: the sentiment, as a word",
        recipe={
            "task": {
                "kind": "classification",
                "labels": _SENTIMENT,
                "template": "<|im_start|>user\nReview: {{ text }}\nSentiment:<|im_end|>\n<|im_start|>assistant\n",
                "max_new_tokens": 4,
            },
            "data": _REVIEWS,
            "training": {"max_steps": 24, "learning_rate": 5e-4},
        },
    ),
    "sequence-decoder": KindCase(
        base=SMOLLM,
        data="film reviews: the sentiment, by a head",
        recipe={
            "task": {
                "kind": "sequence_classification",
                "labels": _SENTIMENT,
                "template": "{{ text }}",
            },
            "data": {**_REVIEWS, "num_test": 128},
            "training": {"max_steps": 24, "batch_size": 8, "learning_rate": 5e-4},
        },
    ),
    "sequence-encoder": KindCase(
        base=MINILM,
        data="film reviews: the sentiment, by a head",
        recipe={
            "task": {
                "kind": "sequence_classification",
                "labels": _SENTIMENT,
                "template": "{{ text }}",
            },
            "data": {**_REVIEWS, "num_test": 400},
            "training": {"max_steps": 100, "learning_rate": 1e-3},
        },
    ),
    "token": KindCase(
        base=MINILM,
        data="sentences of news in lower case: which words stand with a capital, mostly names",
        recipe={
            "task": {
                "kind": "token_classification",
                "labels": list(LABELS),
                "template": "{{ text }}",
            },
            "data": {"source": "file", "num_test": 200, "num_validation": 32},
            "training": {"max_steps": 100, "learning_rate": 2e-3, "max_length": 128},
        },
    ),
    "seq2seq": KindCase(
        base=PAIR,
        data="film reviews: the sentiment, as a generated word",
        recipe={
            "task": {
                "kind": "seq2seq",
                "template": "{{ text }}",
                "max_new_tokens": 4,
            },
            "data": {**_REVIEWS, "num_test": 400},
            "training": {"max_steps": 150, "learning_rate": 3e-3},
            "evaluation": {"metric": "exact_match"},
        },
    ),
    "embeddings": KindCase(
        base=MINILM,
        data="Jupyter's interface texts: the French one among 200, by the English",
        recipe={
            "task": {"kind": "embeddings", "template": "{{ text }}"},
            "data": {**_JUPYTER, "num_test": 200},
            "training": {"max_steps": 60, "batch_size": 32, "learning_rate": 1e-3},
        },
    ),
}
"""By the names that ``--only`` takes, in the table's order; every task kind is among them."""
