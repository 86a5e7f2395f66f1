"""Training on an NVIDIA GPU: run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.harness.training_case import measured

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.trainer.recipe import Recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_a_run_learns_on_the_card(method: str, make_recipe: Callable[..., Recipe]) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    recipe = make_recipe(
        method__name=method,
        training__device="cuda",
        training__dtype="bfloat16",
        training__gradient_checkpointing=True,
    )
    found = measured(recipe, "lorary")
    assert found["losses"][-1] < found["losses"][0]
    assert found["peak_memory_bytes"] > 0
