"""Fit one adapter: transformers' Trainer under our plan, with stops, checkpoints and resuming."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments

from lorary.errors import Cancelled, StorageError, TrainingFailed
from lorary.trainer.batches import PlannedRows, collate, plan_batches
from lorary.trainer.checkpoints import mark_complete
from lorary.trainer.loop import LoraTrainer
from lorary.trainer.progress import step_detail
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.token_store import row_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from transformers import TrainerState

    from lorary.trainer.data import Row
    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a run did.

    Attributes:
        history: one entry per step (``step``, ``loss``, ``learning_rate``, ``grad_norm``) and per
            validation (``step``, ``eval_loss``).
        steps: optimizer steps taken, those before a resume included.
        best_step: the step whose weights were kept.
        num_tokens: unpadded tokens trained on over all steps.
    """

    history: tuple[dict[str, Any], ...]
    steps: int
    best_step: int
    num_tokens: int


def fit(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    *,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    checkpoints: Path,
    identity: str,
    resume_from: Path | None,
    reporter: Reporter,
) -> Fit:
    """Train ``model`` in place and leave the best step's weights in it.

    Raises:
        TrainingFailed: the loss is not finite, or memory ran out.
        Cancelled: SIGINT or SIGTERM; a checkpoint of the last step is kept.
        StorageError: a checkpoint cannot be written.
    """
    training = recipe.training
    lengths = row_lengths(train_rows)
    plan = plan_batches(
        lengths,
        batch_size=training.batch_size,
        num_batches=training.max_steps * training.gradient_accumulation,
        seed=training.seed,
    )
    tokens = [sum(lengths[i] for i in batch) for batch in plan]
    trainer = LoraTrainer(
        model=model,
        args=_arguments(recipe, checkpoints, has_validation=bool(validation_rows)),
        # One item is one planned batch: the Trainer's own batching is set to one.
        train_dataset=PlannedRows(train_rows, plan),
        eval_dataset=_validation_batches(validation_rows, training.batch_size) or None,
        data_collator=partial(_collate_planned, pad_token_id=int(tokenizer.pad_token_id)),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if validation_rows:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=training.patience))
    interrupt = _Interrupt()
    first_step = int(resume_from.name.rpartition("-")[2]) if resume_from else 0
    with reporter.phase("training", training.max_steps, first_step) as advance, interrupt:
        trainer.add_callback(_Steps(advance, tokens, training.gradient_accumulation))
        trainer.add_callback(_Marker(identity))
        trainer.add_callback(interrupt)
        with quiet_libraries():
            _run(trainer, resume_from, recipe)
    if interrupt.is_set and trainer.state.global_step < training.max_steps:
        raise Cancelled(
            f"stopped at step {trainer.state.global_step} of {training.max_steps}; the checkpoint "
            f"is in '{checkpoints}'. Go on with --resume."
        )
    return _result(
        trainer.state, sum(tokens[: trainer.state.global_step * training.gradient_accumulation])
    )


def _result(state: TrainerState, num_tokens: int) -> Fit:
    return Fit(
        history=tuple(dict(entry) for entry in state.log_history if _is_loss(entry)),
        steps=state.global_step,
        best_step=state.best_global_step or state.global_step,
        num_tokens=num_tokens,
    )


def _is_loss(entry: dict[str, Any]) -> bool:
    """Whether a log entry is a step's or a validation's, and not the Trainer's closing summary."""
    return "loss" in entry or "eval_loss" in entry


def _run(trainer: LoraTrainer, resume_from: Path | None, recipe: Recipe) -> None:
    """Call ``train`` and turn what the platform raises into our errors."""
    training = recipe.training
    knobs = (
        f"Lower training.batch_size ({training.batch_size}) and raise "
        "training.gradient_accumulation, cut data.max_words, or set "
        "training.gradient_checkpointing=true."
    )
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingFailed(f"memory ran out: {error}. {knobs}") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise TrainingFailed(f"memory ran out: {error}. {knobs}") from error
        raise
    except OSError as error:
        raise StorageError(
            f"a checkpoint cannot be written: {error}. Free space and go on with --resume; the "
            "checkpoint before it is kept."
        ) from error


def _arguments(recipe: Recipe, checkpoints: Path, *, has_validation: bool) -> TrainingArguments:
    """Translate a recipe; every default of the Trainer that could surprise is set here."""
    training = recipe.training
    every = training.steps_between_evals
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=training.max_steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=round(training.warmup * training.max_steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=every if has_validation else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=has_validation,
        metric_for_best_model="eval_loss" if has_validation else None,
        greater_is_better=False if has_validation else None,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not str(recipe.training.device).startswith("cuda"),
        disable_tqdm=True,
        report_to=[],
        seed=training.seed,
        data_seed=training.seed,
    )


def _collate_planned(items: Sequence[Sequence[Row]], pad_token_id: int) -> dict[str, Any]:
    """Collate the one planned batch that the loader hands over."""
    (rows,) = items
    return collate(rows, pad_token_id)


def _validation_batches(rows: Sequence[Row], batch_size: int) -> list[list[Row]]:
    """Group validation rows by length."""
    ordered = sorted(rows, key=lambda row: -len(row.input_ids))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Reports each step, and validates and saves after the last one."""

    def __init__(
        self, advance: Callable[[int, str], None], tokens: Sequence[int], accumulation: int
    ) -> None:
        self._advance = advance
        self._tokens = tokens
        self._accumulation = accumulation
        self._num_tokens = 0
        self._seconds = 0.0
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._started
        start = (state.global_step - 1) * self._accumulation
        self._num_tokens += sum(self._tokens[start : start + self._accumulation])
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._advance(1, step_detail(logs, self._num_tokens / self._seconds))


class _Marker(TrainerCallback):  # type: ignore[misc]
    """Declares each checkpoint whole once everything is in it."""

    def __init__(self, identity: str) -> None:
        self._identity = identity

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        mark_complete(checkpoint, step=state.global_step, identity=self._identity)


class _Interrupt(TrainerCallback):  # type: ignore[misc]
    """Turns SIGINT and SIGTERM into a stop after the current step; a second one acts at once."""

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_exc: object) -> None:
        self._restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_set:
            control.should_save = control.should_training_stop = True

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
