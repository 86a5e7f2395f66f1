"""What a run is said to take, beside what it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from lorary.bases.load import load_model
from lorary.trainer import estimate, grouped_attention
from lorary.trainer.batches import collate
from lorary.trainer.forecast import forecast, forecast_rows
from lorary.trainer.loop import selected_logits
from lorary.trainer.methods.attach import attach
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.train import prepare
from tests.trainer.families import build_family

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe
    from lorary.trainer.train import Prepared

    MakeRecipe = Callable[..., Recipe]


def allocated(run: Prepared) -> tuple[Any, int]:
    """Take the step of the longest batch for real; return the model, and the allocator's peak."""
    recipe = run.recipe
    model: Any = load_model(
        run.base, quantization=recipe.method.base_quantization, dtype=torch.float32
    )
    grouped_attention.register()
    model.set_attn_implementation(grouped_attention.NAME)
    checkpointing = recipe.training.gradient_checkpointing
    method = attach(model, recipe.method, gradient_checkpointing=checkpointing)
    model = method.model.train()
    batch = collate(estimate._longest_batch(run, recipe.training.max_steps), 0)
    with quiet_libraries(), torch.profiler.profile(profile_memory=True) as profile:
        logits, targets = selected_logits(
            model, batch["input_ids"], batch["labels"], batch.get("position_ids")
        )
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        del logits
        loss.backward()  # type: ignore[no-untyped-call]
    assert profile.profiler is not None
    kineto: Any = profile.profiler.kineto_results
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return model, peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__gradient_checkpointing": True},
        {"training__packing": True, "training__max_length": 120},
        {"method": {"name": "qlora", "rank": 8}},
        {"method": {"name": "full", "rank": 8}},
    ],
    ids=["plain", "checkpointing", "packing", "qlora", "full"],
)
def test_memory_of_a_step_is_what_the_allocator_gives(
    make_recipe: MakeRecipe, changes: dict[str, Any]
) -> None:
    run = prepare(make_recipe(training__batch_size=32, **changes))
    expected = estimate.estimate_memory(run)
    model, peak = allocated(run)
    assert expected.step == pytest.approx(peak, rel=0.05)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert expected.adapter == sum(p.nbytes for p in trained)
    assert expected.optimizer == 2 * expected.adapter
    frozen = sum({id(p): p.nbytes for p in model.parameters() if not p.requires_grad}.values())
    # A quantized parameter does not count the scales of its blocks.
    is_whole = run.recipe.method.base_quantization == "none"
    assert frozen <= expected.weights <= (1.0 if is_whole else 1.05) * frozen


def test_a_longer_batch_and_whole_activations_need_more(make_recipe: MakeRecipe) -> None:
    def step(**changes: Any) -> int:
        return estimate.estimate_memory(prepare(make_recipe(**changes))).step

    plain = step(training__batch_size=16)
    assert step(training__batch_size=32) > 1.5 * plain
    assert step(training__batch_size=16, training__gradient_checkpointing=True) < 0.8 * plain


def test_rehearsal_tells_a_whole_run_from_three_steps(make_recipe: MakeRecipe, quiet: Any) -> None:
    run = prepare(make_recipe(training__max_steps=300, training__eval_every=100))
    one = estimate.rehearse(run, quiet)
    assert one.tokens_per_s > 0
    tokens = sum(
        len(run.train_rows[i].input_ids) for batch in estimate._plan(run, 300) for i in batch
    )
    assert one.fit_seconds >= tokens / one.tokens_per_s
    without = estimate.rehearse(replace(run, validation_rows=[]), quiet)
    assert without.fit_seconds == pytest.approx(tokens / without.tokens_per_s)
    # The libraries themselves are most of it here.
    assert one.expected_memory_bytes == pytest.approx(one.peak_memory_bytes, rel=0.25)


def test_other_kinds_are_rehearsed_though_arithmetic_does_not_cover_them(
    make_recipe: MakeRecipe, quiet: Any, tmp_path: Path
) -> None:
    task = {
        "kind": "sequence_classification",
        "template": "{{ text }}",
        "labels": ["good", "bad"],
    }
    base = build_family("bert", tmp_path / "bert")
    run = prepare(make_recipe(base=str(base), task=task))
    found = forecast(run, quiet)
    assert found["memory_bytes"] is None
    assert found["rehearsal"]["tokens_per_s"] > 0
    rows = forecast_rows(found)
    assert " at " in rows["fit"]
    assert "arithmetic" not in rows["rehearsed (GB)"]
