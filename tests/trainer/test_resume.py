"""A run that was killed at any moment ends as if it had not been: every loss and every weight, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from lorary.errors import CorruptArtifact
from lorary.trainer.recipe_file import recipe_dict
from lorary.trainer.state_files import (
    generator_state,
    read_tree,
    restore_generators,
    write_tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe

QUICK = {"evaluation__skip_base": True, "evaluation__num_golden_probes": 1, "data__num_test": 4}
DROPOUT = {"method__dropout": 0.2, "training__gradient_accumulation": 2, **QUICK}
# A rate far too high: validation gets worse, and the run ends when its patience does.
IMPATIENT = {
    "training__learning_rate": 0.5,
    "training__warmup": 0.0,
    "training__max_steps": 30,
    "training__eval_every": 1,
    "training__patience": 2,
    **QUICK,
}
CASES: list[tuple[str, dict[str, Any], str | None, int]] = [
    ("whole", DROPOUT, None, 0),
    ("between checkpoints", DROPOUT, "step", 5),
    ("while a checkpoint is written", DROPOUT, "writing", 4),
    ("before a checkpoint is in its place", DROPOUT, "rename", 4),
    ("before the output", DROPOUT, "output", 0),
    ("impatient", IMPATIENT, None, 0),
    ("impatient, before its last validation", IMPATIENT, "step", 4),
    ("impatient, after it had stopped", IMPATIENT, "output", 0),
]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, reviews: Path
) -> Callable[[str], Any]:
    """All cases, run once; gives what a case left behind."""
    from tests.trainer.conftest import recipe_of

    folder = tmp_path_factory.mktemp("killed")
    cases = [
        {
            "name": name,
            "recipe": recipe_dict(recipe_of(tiny_base, reviews, **changes)),
            "moment": moment,
            "step": step,
        }
        for name, changes, moment, step in CASES
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.killed", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr

    def result(name: str) -> Any:
        from safetensors.torch import load_file

        lines = (folder / name / "report" / "history.jsonl").read_text().splitlines()
        kept = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
        history = [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]
        facts = json.loads((folder / name / "manifest.json").read_text())["training"]
        return history, facts, load_file(folder / name / "adapter_model.safetensors")

    return result


@pytest.mark.parametrize("name", [name for name, _, moment, _ in CASES if moment])
def test_killed_and_resumed_is_the_unbroken_run(runs: Callable[[str], Any], name: str) -> None:
    expected_history, expected_facts, expected = runs(
        name.split(",")[0] if "," in name else "whole"
    )
    history, facts, tensors = runs(name)
    assert history == expected_history
    for key in ("steps", "best_step", "num_tokens"):
        assert facts[key] == expected_facts[key]
    assert facts["resumed_from"]["is_same_run"]
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(expected[key], tensors[key]) for key in expected)


def test_the_impatient_run_did_stop_early(runs: Callable[[str], Any]) -> None:
    _, facts, _ = runs("impatient")
    assert 3 < facts["steps"] < 30
    assert facts["best_step"] < facts["steps"]


def test_trees_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.arange(4, dtype=torch.int64)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3).bfloat16(), "v": None}},
        "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-4 / 3, "params": [0], "fused": False}],
        "by name": [shared, shared[1:], "text", float("inf")],
        (1, "tuple"): {},
    }
    write_tree(tmp_path, "state", tree)
    found = read_tree(tmp_path, "state")
    assert found["param_groups"] == tree["param_groups"]
    assert type(found["param_groups"][0]["betas"]) is tuple
    assert found["state"][0]["m"].dtype == torch.bfloat16
    assert torch.equal(found["state"][0]["m"], tree["state"][0]["m"])  # type: ignore[index]
    assert torch.equal(found["by name"][1], shared[1:])
    assert found["by name"][2:] == ["text", float("inf")]
    assert found[1, "tuple"] == {}
    with pytest.raises(TypeError, match="not data"):
        write_tree(tmp_path, "code", {"hook": print})
    (tmp_path / "state.safetensors").write_bytes(b"half")
    with pytest.raises(CorruptArtifact, match="no readable state"):
        read_tree(tmp_path, "state")


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        normal = float(np.random.standard_normal())  # keeps a second value for the next call
        return random.random(), random.gauss(0, 1), normal, float(torch.rand(1))

    draw()
    write_tree(tmp_path, "generators", generator_state("cpu"))
    expected = [draw(), draw()]
    restore_generators(read_tree(tmp_path, "generators"), "cpu")
    assert [draw(), draw()] == expected


def test_another_process_count_is_another_run(make_recipe: Callable[..., Recipe]) -> None:
    from lorary.trainer.checkpoints import run_identity

    recipe, tracked = make_recipe(), make_recipe(training__trackers=["tensorboard"])
    assert run_identity(recipe, "a", "b", 1) != run_identity(recipe, "a", "b", 2)
    assert run_identity(recipe, "a", "b") == run_identity(tracked, "a", "b")
