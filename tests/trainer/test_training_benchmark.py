"""The training benchmark measures two loops that do the same work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.harness.training_case import measured
from benchmarks.training_run import table_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorary.trainer.recipe import Recipe


def test_both_loops_begin_with_the_same_loss(make_recipe: Callable[..., Recipe]) -> None:
    """All rows are one batch, so the first loss is of the same rows; B begins at zero in both."""
    recipe = make_recipe(
        data__max_train=8, training__batch_size=8, training__max_steps=4, training__warmup=0.0
    )
    ours, plain = (measured(recipe, contender) for contender in ("lorary", "plain"))
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], abs=2e-3)
    assert ours["losses"][-1] < ours["losses"][0]
    assert plain["losses"][-1] < plain["losses"][0]
    assert ours["tokens"] == plain["tokens"] > 0
    for figures in (ours, plain):
        assert figures["tokens_per_s"] == pytest.approx(figures["tokens"] / figures["seconds"], 0.1)
        assert figures["first_step_s"] > 0


def test_table_sets_the_loops_side_by_side_and_leaves_disturbed_runs_out() -> None:
    def record(contender: str, tokens_per_s: float, *, accepted: bool = True) -> dict[str, Any]:
        return {
            "recipe": "sentiment",
            "contender": contender,
            "tokens_per_s": tokens_per_s,
            "first_step_s": 9.0,
            "peak_memory_bytes": 1.5e9,
            "load": {"foreign_cores": 0.0},
            "accepted": accepted,
        }

    records = [record("lorary", 300), record("plain", 150), record("plain", 1, accepted=False)]
    table = table_of(records)
    assert "| sentiment | lorary | 300 | **2.00x** (bar 1.5x) | 9.0 (bar 20) | 1.50 |" in table
    assert "| sentiment | plain | 150 |" in table
    assert table_of([record("lorary", 300)]) == "nothing was measured on a quiet machine"
