"""QLoRA steps on a random base, by the trainer's own loop: peak memory and speed."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from benchmarks.harness.gpu_base import numbered_tokenizer
from lorary.trainer.batches import collate
from lorary.trainer.encoding import Row
from lorary.trainer.estimate import estimate_memory
from lorary.trainer.fit import fit
from lorary.trainer.loop import selected_logits
from lorary.trainer.meter import peak_memory_bytes
from lorary.trainer.methods.attach import attach
from lorary.trainer.progress import Reporter
from lorary.trainer.recipe_file import build_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from lorary.trainer.kinds import Kind
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.train import Prepared

_WARM_UP = 1


@dataclass(frozen=True)
class _Rows:
    """What the loop asks of a task kind, for rows of random tokens."""

    tokenizer: Any

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        return collate(rows, 0)

    def scores(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return selected_logits(model, batch["input_ids"], batch["labels"])


def train_steps(
    model: Any,
    *,
    vocab: int,
    dtype: str,
    device: str,
    rank: int,
    batch_size: int,
    length: int,
    steps: int,
    gradient_checkpointing: bool,
) -> dict[str, Any]:
    """Train an adapter on every linear layer of ``model``; half of each row is learned.

    Returns:
        ``step_s`` (median), ``tokens_per_s``, ``peak_memory_bytes`` and what the trainer's arithmetic
        says of it beforehand (``lorary train --dry-run``), ``expected_memory_bytes``, and the ``losses``.
    """
    recipe = build_recipe(
        {
            "name": "random",
            "base": "random",
            "task": {"kind": "generation", "template": "{{ text }}"},
            "data": {"source": "file", "path": "rows.jsonl"},
            "method": {"name": "qlora", "rank": rank},
            "training": {
                "max_steps": steps,
                "batch_size": batch_size,
                "max_length": length,
                "dtype": dtype,
                "device": device,
                "gradient_checkpointing": gradient_checkpointing,
            },
        }
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (steps * batch_size, length), generator=generator).tolist()
    rows = [Row(input_ids=tuple(row), num_prompt=length // 2) for row in ids]
    expected = _expected_bytes(model, recipe, rows)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    method = attach(model, recipe.method, gradient_checkpointing=gradient_checkpointing)
    with tempfile.TemporaryDirectory(prefix="lorary-gpu-") as folder:
        fitted = fit(
            method,
            cast("Kind", _Rows(numbered_tokenizer(vocab))),
            recipe,
            train_rows=rows,
            validation_rows=[],
            checkpoints=Path(folder) / "out.checkpoints",
            identity="random",
            resume_from=None,
            reporter=Reporter(quiet=True),
        )
    history = [entry for entry in fitted.history if "loss" in entry]
    step_s = statistics.median(entry["seconds"] for entry in history[_WARM_UP:])
    return {
        "step_s": round(step_s, 4),
        "tokens_per_s": round(batch_size * length / step_s, 1),
        "peak_memory_bytes": peak_memory_bytes(device),
        "expected_memory_bytes": expected,
        "num_trainable": fitted.num_trainable,
        "losses": [round(entry["loss"], 4) for entry in history],
    }


def _expected_bytes(model: Any, recipe: Recipe, rows: list[Row]) -> int:
    """Return what the trainer says that such a run takes, from the base's configuration alone."""
    with tempfile.TemporaryDirectory(prefix="lorary-gpu-") as folder:
        model.config.save_pretrained(folder)
        run = SimpleNamespace(
            recipe=recipe, base=SimpleNamespace(path=Path(folder)), train_rows=rows
        )
        return estimate_memory(cast("Prepared", run)).total
