"""What cannot work is refused when the recipe is read, with the reason."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import InvalidRecipe
from lorary.trainer.estimate import estimate_memory
from lorary.trainer.methods.attach import METHODS
from lorary.trainer.methods.rules import RULES, MethodName
from lorary.trainer.recipe import MethodRecipe
from lorary.trainer.train import prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.trainer.recipe import Recipe


def test_every_name_has_rules_code_and_a_row_in_the_docs() -> None:
    names = set(typing.get_args(MethodName))
    text = (Path(__file__).parents[3] / "docs/methods.md").read_text()
    assert names == set(RULES) == set(METHODS)
    for name, rules in RULES.items():
        assert f"| `{name}` | {rules.what} | [{rules.paper}]" in text


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "dora", "optimizer": "lora-fa"}, "magnitude vectors"),
        ({"name": "vera", "optimizer": "lora-fa"}, "frozen already"),
        ({"name": "vera", "optimizer": "lora-plus"}, "learns no B"),
        ({"name": "adalora", "optimizer": "lora-fa"}, "third factor"),
        ({"name": "adalora", "optimizer": "lora-plus"}, "two sides of one decomposition"),
        ({"name": "lora-fa", "optimizer": "adamw"}, "set method.name to lora"),
        ({"name": "lora-plus", "optimizer": "lora-fa"}, "an optimizer of its own"),
        ({"name": "dora", "quantization": "int8"}, "cannot read it back"),
        ({"name": "pissa", "quantization": "nf4"}, "singular vectors of the base's weights"),
        ({"name": "olora", "quantization": "int8"}, "QR decomposition of the base's weights"),
        ({"name": "eva", "quantization": "nf4"}, "activations that the base's weights give"),
        ({"name": "loftq", "quantization": "none"}, "nothing is lost here"),
        ({"name": "loftq", "quantization": "int8"}, "Use nf4"),
        ({"name": "delta-lora", "dropout": 0.1}, "stands for a gradient of W"),
        ({"name": "vera", "alpha": 16.0}, "vera has none"),
        ({"name": "adalora", "rank": 4, "target_rank": 4}, "comes down to it, is 4"),
        ({"name": "adalora", "rank": 1}, "raise method.rank"),
        ({"lr_ratio": 4.0}, "for the optimizer lora-plus"),
        ({"name": "lora-fa", "lr_ratio": 4.0}, "for the optimizer lora-plus"),
        ({"delta_start": 5}, "for delta-lora, and method.name is lora"),
        ({"name": "pissa", "delta_ratio": 1.0}, "for delta-lora"),
        ({"target_rank": 2}, "for adalora"),
        ({"invocation": "judge"}, "for alora"),
        ({"name": "pissa", "rank_spread": 1.0}, "for eva"),
        ({"name": "olora", "svd_iterations": 0}, "for pissa"),
        ({"name": "delta-lora", "delta_ratio": -1.0}, "between 0 and 100"),
        ({"name": "full", "quantization": "nf4"}, "takes neither a gradient nor a step"),
        ({"name": "full", "quantization": "int8"}, "method.name to qlora"),
        ({"name": "full", "alpha": 16.0}, "full has none"),
        ({"name": "full", "dropout": 0.1}, "no A whose input"),
        ({"name": "full", "optimizer": "lora-plus"}, "whole weights"),
    ],
)
def test_combinations_that_cannot_work(method: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        MethodRecipe(**method)
    assert says in str(caught.value)


def test_defaults_of_each_method() -> None:
    found = {name: MethodRecipe(name=name) for name in typing.get_args(MethodName)}
    assert {n: r.base_quantization for n, r in found.items() if r.base_quantization != "none"} == {
        "qlora": "nf4",
        "loftq": "nf4",
    }
    alphas = {name: recipe.scaled_alpha for name, recipe in found.items()}
    at_rank = {"pissa", "olora", "loftq", "vera", "full"}
    assert {n for n, alpha in alphas.items() if alpha == 8} == at_rank
    assert {n for n, alpha in alphas.items() if alpha == 16} == set(alphas) - at_rank
    assert MethodRecipe(name="rslora", rank=64).scaled_alpha == 16
    assert found["lora-fa"].resolved_optimizer == "lora-fa"
    assert MethodRecipe(name="qlora", optimizer="lora-plus", lr_ratio=8.0).lr_ratio == 8.0


def test_one_optimizer_at_a_time(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(InvalidRecipe, match="brings an AdamW of its own"):
        prepare(make_recipe(method={"name": "lora-plus"}, training__optimizer="adamw-8bit"))


@pytest.mark.parametrize("name", typing.get_args(MethodName))
def test_every_method_is_weighed_without_its_base(
    make_recipe: Callable[..., Recipe], name: str
) -> None:
    own = {"invocation": "assistant\n"} if name == "alora" else {}
    estimate = estimate_memory(prepare(make_recipe(method={"name": name, **own})))
    assert estimate.total > 0


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "delta-lora", "delta_start": 6}, "the base would never move"),
        ({"name": "pissa", "rank": 33}, "32 directions to start from"),
        ({"name": "olora", "rank": 33}, "32 directions to start from"),
        ({"name": "eva", "rank": 40}, "has only 64 inputs"),
    ],
)
def test_what_only_base_and_run_can_tell(
    make_recipe: Callable[..., Recipe], method: dict[str, Any], says: str, tmp_path: Path
) -> None:
    from lorary.trainer.train import train

    with pytest.raises(InvalidRecipe, match=says):
        train(make_recipe(method=method), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_that_never_moves_the_base_is_refused_before_anything_is_loaded(
    make_recipe: Callable[..., Recipe],
) -> None:
    with pytest.raises(InvalidRecipe, match="never move"):
        prepare(make_recipe(base="no-such-base", method={"name": "delta-lora", "delta_start": 9}))
