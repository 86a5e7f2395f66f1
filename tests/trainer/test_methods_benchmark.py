"""The methods benchmark's table, and what it measures itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.harness.method_case import ranks_of_kept, validation_loss
from benchmarks.methods_run import METHODS, table_of
from lorary.trainer.methods.attach import METHODS as KNOWN
from lorary.trainer.train import train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe


def record(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "accuracy": 0.81,
        "validation_loss": 0.5,
        "num_trainable": 1000,
        "peak_bytes": 2e9,
        "step_s": 1.5,
        "quiet": True,
        "adapter_bytes": 4_880_000,
        "rank": 8,
        "conversion_error": 1e-7,
        "ranks": {"rank_90": 3.5, "stable_rank": 1.62},
        **changes,
    }


def test_methods_are_those_of_the_trainer_and_full_has_two_rows() -> None:
    assert set(METHODS) <= set(KNOWN)
    assert set(KNOWN) - set(METHODS) <= {"alora"}, "it answers after an invocation only"
    uncut = {"metrics": {"accuracy": 0.9}, "rank_90": 210.0, "stable_rank": 9.13}
    rows = [
        record("lora"),
        record("dora", ranks=None),
        record("full", conversion_error=0.7, uncut=uncut, cut_validation_loss=0.6),
    ]
    assert table_of(rows).splitlines()[2:] == [
        "| lora | 0.810 | 0.500 | 1,000 | 2,000 | 1.50 | 4.88 | 8 | 1.0e-07 | 3.5 | 1.6 |",
        "| dora | 0.810 | 0.500 | 1,000 | 2,000 | 1.50 | 4.88 | 8 | 1.0e-07 | - | - |",
        "| full | 0.900 | 0.500 | 1,000 | 2,000 | 1.50 | - | - | - | 210 | 9.1 |",
        "| full, its SVD at rank 8 | 0.810 | 0.600 | - | - | - | 4.88 | 8 | 7.0e-01 | 3.5 | 1.6 |",
    ]


def test_ranks_are_those_of_the_products(tmp_path: Path) -> None:
    tensors = {}
    for name, sizes in {"x": (3.0, 1.0, 1.0), "y": (1.0, 1.0, 1.0)}.items():
        tensors[f"{name}.lora_A.weight"] = torch.eye(3, 8)
        tensors[f"{name}.lora_B.weight"] = torch.eye(5, 3) * torch.tensor(sizes)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    # 9, 1, 1: two hold 10 of 11; 1, 1, 1: all three. 11 / 9 and 3.
    found = ranks_of_kept(tmp_path)
    assert found == {"rank_90": 2.5, "stable_rank": pytest.approx((11 / 9 + 3) / 2)}
    tensors["x.lora_magnitude_vector"] = torch.ones(5)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert ranks_of_kept(tmp_path) is None


def test_validation_loss_is_the_trainers(
    make_recipe: Callable[..., Recipe], quiet: Reporter, tmp_path: Path
) -> None:
    recipe = make_recipe(evaluation={"skip_base": True, "num_golden_probes": 1, "report": False})
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    losses = manifest.training["loss_curve"]["validation_loss"]
    assert validation_loss(recipe, tmp_path / "out") == pytest.approx(min(losses), abs=1e-4)
