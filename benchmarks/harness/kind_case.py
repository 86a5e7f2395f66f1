"""One row of the ``kinds`` benchmark, taken in this process: ``kind_case NAME THREADS FOLDER``.

Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.capitals import write_rows
from benchmarks.kind_bases import base_named
from benchmarks.kind_cases import CASES
from lorary.bases import find_base
from lorary.registry import Registry
from lorary.trainer.progress import Reporter
from lorary.trainer.recipe_file import build_recipe
from lorary.trainer.train import train


def main() -> None:
    """Train, push, and print the figures."""
    name, threads, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    case = CASES[name]
    if threads:
        torch.set_num_threads(threads)
    recipe = build_recipe(recipe_tree(name, base_named(case.base, folder), folder))
    manifest = train(recipe, folder / "out", reporter=Reporter(quiet=True))
    registry = Registry.open(folder / "registry", create=True)
    registry.push(folder / "out", "a", base=find_base(recipe.base).card)
    kept = registry.manifest(registry.resolve("a"))
    sizes = {entry.path: entry.size for entry in kept.files}
    history = (folder / "out/report/history.jsonl").read_text().splitlines()
    seconds = [row["seconds"] for row in map(json.loads, history) if "loss" in row]
    metrics = manifest.metrics
    assert metrics is not None
    difference = metrics.uncertainty[metrics.primary].difference
    assert difference is not None
    found: dict[str, Any] = {
        "name": name,
        "kind": recipe.task.kind,
        "base": case.base,
        "data": case.data,
        "metric": metrics.primary,
        "base_value": metrics.base[metrics.primary],
        "adapter_value": metrics.adapter[metrics.primary],
        "difference": [difference.low, difference.high],
        "num_train": manifest.data["num_train"],
        "num_test": manifest.data["num_test"],
        "steps": manifest.training["steps"],
        "batch_size": recipe.training.batch_size,
        "rank": recipe.method.rank,
        "learning_rate": recipe.training.learning_rate,
        "dtype": manifest.training["recipe"]["training"]["dtype"],
        "num_trainable": manifest.training["num_trainable"],
        "step_s": statistics.median(seconds[1:]),
        "adapter_bytes": sizes["adapter_model.safetensors"],
    }
    print(json.dumps(found))


def recipe_tree(name: str, base: str, folder: Path) -> dict[str, Any]:
    """Return a case's recipe with what all cases share; writes the rows that no source has."""
    given = CASES[name].recipe
    data = dict(given["data"])
    if data["source"] == "file":
        data["path"] = str(folder / "rows.jsonl")
        write_rows(Path(data["path"]))
    training = {"batch_size": 16, "max_length": 96, **given["training"]}
    # The last step's weights are measured, as in the table of methods.
    training["eval_every"] = training["max_steps"]
    shared = {"report": False, "num_golden_probes": 1}
    return {
        **given,
        "name": name,
        "base": base,
        "data": data,
        "method": {"rank": 8},
        "training": training,
        "evaluation": {**shared, **given.get("evaluation", {})},
    }


if __name__ == "__main__":
    main()
