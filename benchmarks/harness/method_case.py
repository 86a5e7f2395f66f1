"""One row of the ``methods`` benchmark, taken in this process: ``method_case JSON FOLDER``.

Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lorary.bases import find_base
from lorary.registry import Registry
from lorary.trainer import load_recipe
from lorary.trainer.fit import validation_batches
from lorary.trainer.progress import Reporter
from lorary.trainer.report.ranks import ranks_of
from lorary.trainer.report.weights import ModuleChange, product_sizes
from lorary.trainer.train import dtype_of, prepare, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorary.trainer.recipe import Recipe

_RECIPE = Path(__file__).resolve().parents[2] / "recipes/sentiment.yaml"


class Stopwatch(Reporter):
    """Notes when each training step ended."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ends: list[float] = []

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yield an ``advance`` that looks at the clock."""
        del total, done

        def advance(count: int, detail: str = "") -> None:
            del count, detail
            if name == "training":
                self.ends.append(time.perf_counter())

        yield advance

    def step_s(self) -> float:
        """Return the median time from the end of a step to that of the next."""
        gaps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps)


def ranks_of_kept(folder: Path) -> dict[str, float] | None:
    """Return how many directions the changes of an adapter have, in the median over its modules.

    Args:
        folder: as a registry keeps it: ΔW = B A, no scale beside it.

    Returns:
        ``rank_90`` and ``stable_rank`` (``lorary.trainer.report.ranks``); ``None`` for DoRA, whose ΔW is no
        product.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    if any("magnitude" in key for key in tensors):
        return None
    changes = []
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        size, values = product_sizes(b.float(), a.float(), 1.0)
        change = ModuleChange(
            name=key,
            layer=None,
            kind="",
            delta_norm=size,
            weight_norm=0.0,
            singular_values=values,
        )
        changes.append(change)
    found = ranks_of(changes)
    assert found is not None, "every module of an adapter that was pushed has A and B"
    return {"rank_90": found.rank_90, "stable_rank": found.stable_rank}


def validation_loss(recipe: Recipe, folder: Path) -> float:
    """Return the validation loss of an adapter as the trainer reckons it, nats a learned token."""
    from peft import PeftModel

    run = prepare(recipe)
    model: Any = PeftModel.from_pretrained(run.kind.load(dtype_of(run.recipe))[0], str(folder))
    model.eval()
    losses = []
    for rows in validation_batches(run.validation_rows, run.recipe.training.batch_size):
        with torch.inference_mode():
            logits, targets = run.kind.scores(model, run.kind.collate(rows))
        losses.append(float(F.cross_entropy(logits.float(), targets)))
    return statistics.mean(losses)


def main() -> None:
    """Train, push, and print the figures."""
    case, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    method = {"rank": 8, **case["method"], "name": case["name"]}
    overrides = [f"method.{key}={value}" for key, value in method.items()]
    overrides += [
        f"training.max_steps={case['steps']}",
        f"training.eval_every={case['steps']}",
        "evaluation.report=false",
        f"training.batch_size={case['batch_size']}",
        f"training.learning_rate={case['learning_rate']}",
        f"data.num_test={case['num_test']}",
        f"evaluation.skip_base={str(not case['is_first']).lower()}",
        "evaluation.num_golden_probes=1",
    ]
    watch = Stopwatch()
    recipe = load_recipe(_RECIPE, overrides)
    manifest = train(recipe, folder / "out", reporter=watch)
    # Of the trainer, not of what the registry needs on top.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    registry = Registry.open(folder / "registry", create=True)
    registry.push(folder / "out", "a", base=find_base(recipe.base).card)
    kept = registry.manifest(registry.resolve("a"))
    assert manifest.metrics is not None
    assert kept.conversion is not None
    history = (folder / "out/report/history.jsonl").read_text().splitlines()
    losses = [row["eval_loss"] for row in map(json.loads, history) if "eval_loss" in row]
    sizes = {entry.path: entry.size for entry in kept.files}
    found: dict[str, Any] = {
        "name": case["name"],
        "method": method,
        "learning_rate": case["learning_rate"],
        "accuracy": manifest.metrics.adapter["accuracy"],
        "validation_loss": losses[-1],
        "num_trainable": manifest.training["num_trainable"],
        "peak_bytes": peak_bytes,
        "step_s": watch.step_s(),
        "adapter_bytes": sizes["adapter_model.safetensors"],
        "rank": kept.method.rank,
        "conversion_error": max(manifest.training["conversion_error"], kept.conversion.max_error),
    }
    pulled = registry.pull("a", folder / "pulled")
    ranks = ranks_of_kept(pulled)
    if ranks is not None:
        found["ranks"] = ranks
    if "uncut" in manifest.training:
        found["uncut"] = manifest.training["uncut"]
        found["cut_validation_loss"] = validation_loss(recipe, pulled)
    if manifest.metrics.base:
        found["base_accuracy"] = manifest.metrics.base["accuracy"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
