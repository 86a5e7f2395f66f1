"""One run of the ``training`` benchmark, in this process: ``training_case CONTENDER RECIPE STEPS SEED``.

Prints one JSON object.
"""

from __future__ import annotations

import time

STARTED = time.time()

import json  # noqa: E402 - the clock starts before anything is imported
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorary.trainer.encoding import Row
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.train import Prepared

_WARM_UP = 2
"""Steps at the start that count as start-up, not as speed."""


def lorary_steps(run: Prepared) -> list[dict[str, float]]:
    """Train as ``lorary train`` does; return ``tokens``, ``seconds``, ``loss`` and ``ended`` of each step."""
    from lorary.trainer.progress import Reporter
    from lorary.trainer.train import fit_adapter

    ended: list[float] = []

    class Clock(Reporter):
        @contextmanager
        def phase(
            self, name: str, total: int, done: int = 0
        ) -> Iterator[Callable[[int, str], None]]:
            yield lambda _count, _detail: ended.append(time.time())

    with tempfile.TemporaryDirectory(prefix="lorary-training-") as folder:
        _, fitted = fit_adapter(run, Path(folder) / "out", None, Clock(quiet=True))
    steps = [entry for entry in fitted.history if "loss" in entry]
    return [{**step, "ended": at} for step, at in zip(steps, ended, strict=True)]


def plain_steps(run: Prepared) -> list[dict[str, float]]:
    """Train the plain way; return the same."""
    import peft
    import torch
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from lorary.trainer.methods.attach import linear_names

    training, method = run.recipe.training, run.recipe.method
    torch.manual_seed(training.seed)
    model = AutoModelForCausalLM.from_pretrained(
        run.base.path, dtype=getattr(torch, training.dtype), local_files_only=True
    )
    model.config.use_cache = False
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=method.rank,
        lora_alpha=method.scaled_alpha,
        lora_dropout=method.dropout,
        target_modules=linear_names(model),
    )
    steps: list[dict[str, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append({"seconds": time.perf_counter() - self.began, "ended": time.time()})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                steps[-1]["loss"] = logs["loss"]

    tokens: list[int] = []
    pad = DataCollatorForSeq2Seq(run.tokenizer, label_pad_token_id=-100)

    def collate(rows: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(row["input_ids"]) for row in rows))
        return pad(rows)

    with tempfile.TemporaryDirectory(prefix="plain-training-") as folder:
        trainer = Trainer(
            model=peft.get_peft_model(model, config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=training.max_steps,
                per_device_train_batch_size=training.batch_size,
                gradient_accumulation_steps=training.gradient_accumulation,
                learning_rate=training.learning_rate,
                lr_scheduler_type=training.schedule,
                warmup_steps=round(training.warmup * training.max_steps),
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=training.device == "cpu",
                seed=training.seed,
            ),
            train_dataset=plain_rows(run.train_rows),
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    each = training.gradient_accumulation
    for i, step in enumerate(steps):
        step["tokens"] = sum(tokens[i * each : (i + 1) * each])
    return steps


def plain_rows(rows: Sequence[Row]) -> list[dict[str, list[int]]]:
    """Return rows as a tutorial has them: prompt masked in the labels, nothing padded yet."""
    return [
        {
            "input_ids": list(row.input_ids),
            "attention_mask": [1] * len(row.input_ids),
            "labels": [-100] * row.num_prompt + list(row.input_ids[row.num_prompt :]),
        }
        for row in rows
    ]


def measured(recipe: Recipe, contender: str) -> dict[str, Any]:
    """Run one contender and return its figures."""
    from lorary.trainer.meter import peak_memory_bytes
    from lorary.trainer.train import prepare

    run = replace(prepare(recipe), validation_rows=[])
    steps = {"lorary": lorary_steps, "plain": plain_steps}[contender](run)
    counted = steps[_WARM_UP:]
    seconds = sum(step["seconds"] for step in counted)
    return {
        "tokens": int(sum(step["tokens"] for step in counted)),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(step["tokens"] for step in counted) / seconds, 1),
        "first_step_s": round(steps[0]["ended"] - STARTED, 2),
        "peak_memory_bytes": peak_memory_bytes(run.recipe.training.device),
        "dtype": run.recipe.training.dtype,
        "losses": [round(step["loss"], 4) for step in steps],
    }


def main() -> None:
    contender, recipe_path, num_steps, seed = sys.argv[1:]
    from lorary.trainer.recipe_file import load_recipe
    from lorary.trainer.threads import use_threads

    use_threads(None)
    recipe = load_recipe(
        Path(recipe_path),
        [f"training.max_steps={num_steps}", f"training.seed={seed}"],
    )
    print(json.dumps(measured(recipe, contender)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
