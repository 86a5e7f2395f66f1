"""What a step does: its schedule, its optimizer, and what is told about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from lorary.trainer.recipe_file import recipe_dict
from lorary.trainer.train import train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe

    MakeRecipe = Callable[..., Recipe]

QUICK = {"evaluation__skip_base": True, "evaluation__num_golden_probes": 1, "data__num_test": 4}


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "report" / "history.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Of 8 steps two warm up; what a step takes is the rate before it is moved on.
        ("cosine", [0.0, 0.5, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_rates_warm_up_and_fall_as_the_schedule_says(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, schedule: str, expected: list[float]
) -> None:
    recipe = make_recipe(
        training__schedule=schedule, training__warmup=0.25, training__max_steps=8, **QUICK
    )
    train(recipe, tmp_path / "out", reporter=quiet)
    rates = [entry["learning_rate"] / 1e-2 for entry in steps(tmp_path / "out")]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_every_step_tells_its_speed_memory_and_gradient(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    manifest = train(make_recipe(**QUICK), tmp_path / "out", reporter=quiet)
    entries = steps(tmp_path / "out")
    assert len(entries) == 6
    assert sum(entry["tokens"] for entry in entries) == manifest.training["num_tokens"]
    for entry in entries:
        assert entry["tokens_per_s"] == pytest.approx(entry["tokens"] / entry["seconds"], rel=0.05)
        assert entry["grad_norm"] > 0
        # The system counts resident pages a little behind.
        assert 50e6 < entry["memory_bytes"] < 1.01 * manifest.training["peak_memory_bytes"]


def test_eight_bit_moments_learn_and_are_smaller(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only tensors of 4,096 values or more are kept in 8 bits, so the rank is large."""
    from lorary.trainer import state_files

    sizes: dict[str, int] = {}
    before = state_files.write_tree

    def write_tree(folder: Path, name: str, tree: Any) -> None:
        before(folder, name, tree)
        sizes[name] = (folder / f"{name}.safetensors").stat().st_size

    monkeypatch.setattr("lorary.trainer.resumable.write_tree", write_tree)
    found = {}
    for optimizer in ("adamw", "adamw-8bit"):
        recipe = make_recipe(training__optimizer=optimizer, method__rank=64, **QUICK)
        train(recipe, tmp_path / optimizer, reporter=quiet)
        found[optimizer] = (sizes["optimizer"], steps(tmp_path / optimizer))
    assert found["adamw-8bit"][0] < 0.4 * found["adamw"][0]
    for one, other in zip(found["adamw"][1], found["adamw-8bit"][1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.1)


def test_tensorboard_gets_the_figures_of_every_step(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(training__trackers=["tensorboard"], **QUICK)
    train(recipe, tmp_path / "out", reporter=quiet)
    events = EventAccumulator(str(tmp_path / "out.tensorboard"))
    events.Reload()
    found = {(event.step, event.value) for event in events.Scalars("train/loss")}
    expected = {(entry["step"], entry["loss"]) for entry in steps(tmp_path / "out")}
    assert {step for step, _ in found} == {step for step, _ in expected}
    assert sorted(v for _, v in found) == pytest.approx(sorted(v for _, v in expected), rel=1e-6)
    tags = set(events.Tags()["scalars"])
    wanted = {"learning_rate", "grad_norm", "tokens_per_s", "memory_bytes"}
    assert {f"train/{name}" for name in wanted} | {"eval/loss"} <= tags


def test_two_processes_train_as_one_of_twice_the_batch(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path
) -> None:
    """What ``accelerate launch`` starts on GPUs, on a CPU: the same rows in a step, the same losses."""
    changes = {"training__max_steps": 2, "training__eval_every": 2, **QUICK}
    train(
        make_recipe(training__gradient_accumulation=2, **changes), tmp_path / "one", reporter=quiet
    )
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(make_recipe(**changes))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "lorary.trainer", str(path), "--output", str(tmp_path / "two"), "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"]["num_processes"] == 2
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [entry["tokens"] for entry in one] == [entry["tokens"] for entry in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
