"""The real base and the real data: converted once, loaded, and a few steps of sentiment teach it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import assets
from lorary.trainer import load_recipe
from lorary.trainer.data import load_splits
from lorary.trainer.similarity import jaccard, words_of
from lorary.trainer.train import fit_adapter, prepare

if TYPE_CHECKING:
    from lorary.trainer.progress import Reporter

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def fetched_assets() -> None:
    """These tests fail rather than skip where the assets are absent: nothing else covers them."""
    needed = [package for package in assets.CATALOGUE.values() if package.by_default]
    absent = [package.name for package in needed if not package.folder.is_dir()]
    if absent:
        pytest.fail(f"asset packages {absent} are not fetched. Run: make assets", pytrace=False)


@pytest.mark.slow
def test_three_steps_of_sentiment_reduce_the_loss(quiet: Reporter, tmp_path: Path) -> None:
    recipe = load_recipe(
        RECIPES / "sentiment.yaml",
        [
            *("training.max_steps=3", "training.batch_size=8", "training.warmup=0"),
            *("data.num_test=2", "data.num_validation=8", "training.eval_every=1"),
            *("data.max_train=64", "training.device=cpu"),
        ],
    )
    run = prepare(recipe)
    assert run.base.name == "smollm2-135m"
    assert run.base.card.architecture == "LlamaForCausalLM"
    method, fitted = fit_adapter(run, tmp_path / "out", None, quiet)
    validation = [entry["eval_loss"] for entry in fitted.history if "eval_loss" in entry]
    assert validation[-1] < 0.8 * validation[0]
    assert all(p.dtype == torch.float32 for p in method.model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sentiment", "summarization", "translation"])
def test_no_held_out_example_is_like_a_training_one(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    splits = load_splits(recipe)
    assert len(splits.test) == recipe.data.num_test
    trained: Any = [words_of(example.text) for example in splits.train]
    for example in splits.test[:40]:
        mine = words_of(example.text)
        assert max(jaccard(mine, other) for other in trained) <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sentiment", "summarization", "translation"])
def test_shipped_recipe_can_be_prepared(name: str) -> None:
    run = prepare(load_recipe(RECIPES / f"{name}.yaml"))
    assert run.num_too_long < len(run.train_rows) / 20
