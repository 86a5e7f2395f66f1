"""A small learnable task over the tiny base: is the film good or bad?"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from lorary.trainer.progress import Reporter
from lorary.trainer.recipe_file import build_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe

TEMPLATE = "<|im_start|>user\n{{ text }}<|im_end|>\n<|im_start|>assistant\n"
SUBJECTS = ["cat", "dog", "sun", "sky", "hat", "mat", "film", "red", "blue", "big"]


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 80 distinct sentences whose last word is the answer."""
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    rows = []
    for i, subject in enumerate(SUBJECTS):
        for other in SUBJECTS[: i + 1]:
            for label in ("good", "bad"):
                text = f"the {subject} film on the {other} was {label}"
                rows.append({"review": text, "sentiment": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(base: Path, data: Path, /, **changes: Any) -> Recipe:
    """Build the recipe of a run of seconds; dotted keyword arguments change keys."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "base": str(base),
        "task": {
            "kind": "classification",
            "template": TEMPLATE,
            "labels": ["good", "bad"],
            "max_new_tokens": 4,
        },
        "data": {
            "source": "file",
            "path": str(data),
            "columns": {"text": "review", "target": "sentiment"},
            "num_test": 12,
            "num_validation": 6,
            "max_similarity": 1.0,
        },
        "method": {"rank": 4},
        "training": {
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "eval_every": 2,
            "dtype": "float32",
            "device": "cpu",
        },
        # Drawing takes longer than these runs; test_report.py asks for it.
        "evaluation": {"report": False},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            tree.setdefault(group, {})[name] = value
        elif group == "evaluation":
            tree[group] |= value
        else:
            tree[group] = value
    return build_recipe(tree)


@pytest.fixture
def make_recipe(tiny_base: Path, reviews: Path) -> Callable[..., Recipe]:
    """``recipe_of`` over the tiny base and the reviews."""
    return partial(recipe_of, tiny_base, reviews)


@pytest.fixture
def quiet() -> Reporter:
    return Reporter(quiet=True)
