"""Fit one adapter: transformers' Trainer under our plan, with stops, checkpoints and resuming."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lorary.errors import Cancelled, CorruptArtifact, StorageError, TrainingFailed
from lorary.trainer import processes
from lorary.trainer.batches import PlannedRows, plan_rows
from lorary.trainer.checkpoints import step_of
from lorary.trainer.loop import LoraTrainer
from lorary.trainer.meter import StepMeter
from lorary.trainer.methods.optimizers import own_optimizer
from lorary.trainer.optimizers import OPTIMIZERS
from lorary.trainer.progress import step_detail
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.resumable import stopped_early_at
from lorary.trainer.token_store import row_lengths
from lorary.trainer.trackers import tracker_callbacks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from transformers import TrainerState

    from lorary.trainer.kinds import Kind
    from lorary.trainer.kinds.kind import TokenRow
    from lorary.trainer.methods.method import Attached
    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a run did.

    Attributes:
        history: one entry per step (``step``, ``loss``, ``learning_rate``, ``grad_norm`` before
            clipping, ``tokens``, ``seconds``, ``tokens_per_s``, ``memory_bytes``) and per validation
            (``step``, ``eval_loss``).
        steps: optimizer steps taken, those before a resume included.
        best_step: the step whose weights were kept.
        num_tokens: unpadded tokens trained on over all steps.
        num_trainable: how many numbers were learned.
    """

    history: tuple[dict[str, Any], ...]
    steps: int
    best_step: int
    num_tokens: int
    num_trainable: int


def fit(
    method: Attached,
    kind: Kind,
    recipe: Recipe,
    *,
    train_rows: Sequence[TokenRow],
    validation_rows: Sequence[TokenRow],
    checkpoints: Path,
    identity: str,
    resume_from: Path | None,
    reporter: Reporter,
    watch: Callable[[float], None] | None = None,
) -> Fit:
    """Train ``method.model`` in place and leave the best step's weights in it.

    Args:
        method: freshly attached.
        kind: what is learned from a row, and the tokenizer.
        recipe: with no ``auto`` left.
        train_rows: to learn from.
        validation_rows: to choose the best step by; may be empty.
        checkpoints: folder of this run's checkpoints, ``<output>.checkpoints``; TensorBoard's files go
            to ``<output>.tensorboard``, where the recipe asks for them.
        identity: what ``run_identity`` returned.
        resume_from: a checkpoint to go on from.
        reporter: where progress goes.
        watch: told every validation loss; what it raises ends the run and goes through.

    Raises:
        TrainingFailed: the loss or a weight is not finite, or memory ran out.
        Cancelled: SIGINT or SIGTERM; a checkpoint of the last step is kept.
        StorageError: a checkpoint cannot be written.
        CorruptArtifact: the checkpoint to go on from does not fit the model.
    """
    training = recipe.training
    lengths = row_lengths(train_rows)
    # A run that had stopped early before it was killed takes no further step.
    stopped_at = stopped_early_at(resume_from, training.patience) if resume_from else None
    max_steps = stopped_at or training.max_steps
    batches_a_step = training.gradient_accumulation * processes.num_processes()
    plan = plan_rows(
        train_rows,
        batch_size=training.batch_size,
        num_batches=max_steps * batches_a_step,
        seed=training.seed,
    )
    tokens = [
        sum(lengths[i] for batch in plan[start : start + batches_a_step] for i in batch)
        for start in range(0, len(plan), batches_a_step)
    ]
    meter = StepMeter(tokens, training.device)
    trainer = LoraTrainer(
        model=method.model,
        method=method,
        optimizers=(own_optimizer(method.model, recipe), None),
        args=_arguments(recipe, checkpoints, max_steps, has_validation=bool(validation_rows)),
        meter=meter,
        identity=identity,
        # One item is one planned batch: the Trainer's own batching is set to one.
        train_dataset=PlannedRows(train_rows, plan),
        eval_dataset=validation_batches(validation_rows, training.batch_size) or None,
        data_collator=lambda items: kind.collate(*items),  # the one planned batch that comes
        processing_class=kind.tokenizer,
        scores=kind.scores,
    )
    trainer.remove_callback(PrinterCallback)
    if validation_rows:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=training.patience))
    if processes.is_first():
        tracking = checkpoints.with_name(f"{checkpoints.stem}.tensorboard")
        for tracker in tracker_callbacks(training.trackers, tracking):
            trainer.add_callback(tracker)
    else:
        # Alike in all processes so far; dropout must differ between them.
        set_seed(training.seed + processes.process_index())
    interrupt = _Interrupt()
    first_step = step_of(resume_from) if resume_from else 0
    with reporter.phase("training", max_steps, first_step) as advance, interrupt:
        trainer.add_callback(_Steps(advance, meter))
        trainer.add_callback(_AfterStep(method))
        trainer.add_callback(interrupt)
        if watch is not None:
            trainer.add_callback(_Watch(watch))
        with quiet_libraries():
            _run(trainer, resume_from, recipe)
    if interrupt.was_heeded and trainer.state.global_step < max_steps:
        raise Cancelled(
            f"stopped at step {trainer.state.global_step} of {training.max_steps}; the checkpoint "
            f"is in '{checkpoints}'. Go on with --resume."
        )
    _check_weights(method.model, trainer.state.global_step)
    num_trainable = sum(p.numel() for p in method.model.parameters() if p.requires_grad)
    return _result(trainer.state, sum(tokens[: trainer.state.global_step]), num_trainable)


def _check_weights(model: Any, step: int) -> None:
    """Refuse what the last step may have spoiled after its loss was still finite."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise TrainingFailed(
                f"after step {step} '{name}' holds values that are not finite, so nothing is written. "
                "Lower training.learning_rate."
            )


def _result(state: TrainerState, num_tokens: int, num_trainable: int) -> Fit:
    return Fit(
        history=tuple(dict(entry) for entry in state.log_history if _is_loss(entry)),
        steps=state.global_step,
        best_step=state.best_global_step or state.global_step,
        num_tokens=num_tokens,
        num_trainable=num_trainable,
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
        if "size mismatch" in str(error) and resume_from is not None:
            raise CorruptArtifact(
                f"checkpoint '{resume_from}' does not fit this model: {error}. Run without --resume."
            ) from error
        raise
    except OSError as error:
        raise StorageError(
            f"a checkpoint cannot be written: {error}. Free space and go on with --resume; the "
            "checkpoint before it is kept."
        ) from error


def _arguments(
    recipe: Recipe, checkpoints: Path, max_steps: int, *, has_validation: bool
) -> TrainingArguments:
    """Translate a recipe; every default of the Trainer that could surprise is set here."""
    training = recipe.training
    every = training.steps_between_evals
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=max_steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        # transformers' "constant" leaves warm-up out.
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(
            training.schedule, training.schedule
        ),
        warmup_steps=round(training.warmup * training.max_steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=OPTIMIZERS[training.optimizer].optim,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=every if has_validation else None,
        save_strategy="steps",
        save_steps=every,
        # Without it, early stopping would forget how many validations were no better.
        restore_callback_states_from_checkpoint=True,
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
        run_name=recipe.name,
        seed=training.seed,
        data_seed=training.seed,
    )


def validation_batches(rows: Sequence[TokenRow], batch_size: int) -> list[list[TokenRow]]:
    """Group validation rows by length; the validation loss is the mean of these batches' means."""
    ordered = sorted(rows, key=lambda row: -len(row.input_ids))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Reports each step, and validates and saves after the last one."""

    def __init__(self, advance: Callable[[int, str], None], meter: StepMeter) -> None:
        self._advance = advance
        self._meter = meter

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.stop(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._advance(1, step_detail(logs, self._meter.tokens_per_s))


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Tells somebody each validation loss."""

    def __init__(self, watch: Callable[[float], None]) -> None:
        self._watch = watch

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self._watch(float(metrics["eval_loss"]))


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """Tells the method of each step of the optimizer, before gradients are dropped."""

    def __init__(self, method: Attached) -> None:
        self._method = method

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The step is counted after this.
        self._method.after_step(state.global_step + 1)


class _Interrupt(TrainerCallback):  # type: ignore[misc]
    """Turns SIGINT and SIGTERM into a stop after the current step; a second one acts at once.

    Attributes:
        was_heeded: whether the run was stopped; in all processes alike.
    """

    def __init__(self) -> None:
        self.was_heeded = False
        self._is_set = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_exc: object) -> None:
        self._restore()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if processes.any_of(self._is_set):
            self.was_heeded = control.should_save = control.should_training_stop = True

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._is_set = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
