"""A training run from recipe to output folder, in the order in which it happens.

1. prepare: recipe, base, data, rows; everything that can be wrong is found here, before any work
2. load the base (quantized where the recipe says so) and attach the method
3. fit, with checkpoints beside the output folder
4. evaluate adapter and base on the same held-out examples
5. write the output folder in one rename, then drop the checkpoints
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorary.bases import Base, PromptBuilder, find_base
from lorary.bases.load import default_dtype, load_tokenizer
from lorary.errors import InvalidRecipe, InvalidRequest
from lorary.registry.manifest import SERVED_KINDS
from lorary.trainer import processes
from lorary.trainer.answered import Answered, figures_of, uncut_figures_of
from lorary.trainer.checkpoints import identity_of, newest_checkpoint, run_identity, step_of
from lorary.trainer.data import Splits, data_facts, load_splits
from lorary.trainer.encoding import Encoder
from lorary.trainer.kinds import Kind, kind_of
from lorary.trainer.meter import peak_memory_bytes
from lorary.trainer.methods.alora import check_prompts, check_rows, invocation_ids
from lorary.trainer.methods.rules import check_plan
from lorary.trainer.optimizers import check_optimizer
from lorary.trainer.output import (
    build_manifest,
    check_output,
    golden_probes,
    write_output,
)
from lorary.trainer.packing import check_isolation
from lorary.trainer.progress import Reporter
from lorary.trainer.provenance import golden_logits, hardware, loss_curve, uncut_facts
from lorary.trainer.quantplan.use import plan_facts
from lorary.trainer.recipe import Recipe
from lorary.trainer.recipe_file import recipe_dict
from lorary.trainer.report import write_report
from lorary.trainer.served_template import with_served_template
from lorary.trainer.sources import resolve_shape
from lorary.trainer.token_store import row_lengths
from lorary.trainer.trackers import check_trackers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from lorary.registry.manifest import Manifest, Task
    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.fit import Fit
    from lorary.trainer.methods.method import Attached
    from lorary.trainer.report.ranks import OtherRun
    from lorary.trainer.tasks.recipe import TasksRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that is known to be possible; ``recipe`` has no ``auto`` left, and rows are its kind's."""

    recipe: Recipe
    base: Base
    tokenizer: Any
    builder: PromptBuilder
    kind: Kind
    splits: Splits
    train_rows: Sequence[Any]
    validation_rows: Sequence[Any]
    num_too_long: int
    invocation: tuple[int, ...] = ()

    @property
    def identity(self) -> str:
        """What a checkpoint must match to be resumed."""
        return run_identity(
            self.recipe,
            base_identity(self.base.card.fingerprint, plan_facts(self.kind.formats)),
            self.data_fingerprint,
            processes.num_processes(),
        )

    @property
    def parts(self) -> Mapping[str, Prepared]:
        """What is measured: the run of each task by its name; ``""`` where there is one task."""
        return {"": self}

    @property
    def task(self) -> Task:
        """What the manifest says the adapter does."""
        return self.recipe.task.to_manifest()

    @property
    def tasks(self) -> dict[str, Task]:
        """What it does, by name, where it does several things."""
        return {}

    @property
    def data_fingerprint(self) -> str:
        """``sha256:`` of all data."""
        return self.splits.fingerprint

    def data_facts(self) -> dict[str, Any]:
        """Return what the manifest says about the data."""
        return data_facts(self.splits, self.recipe, self.num_too_long)

    def recorded(self) -> dict[str, Any]:
        """Return the recipe as the manifest has it."""
        return recipe_dict(self.recipe)


def base_identity(fingerprint: str, plan: Mapping[str, Any]) -> str:
    """Return what identifies a base as it is trained on: a plan's file has a name, what counts is what is in it."""
    return f"{fingerprint} {plan}" if plan else fingerprint


def prepare(
    recipe: Recipe | TasksRecipe, reporter: Reporter | None = None, base: Base | None = None
) -> Prepared:
    """Find the base, read and split the data, tokenize; loads no weights, writes no output.

    Args:
        recipe: of one task, or of several for a shared adapter.
        reporter: where progress goes.
        base: the recipe's, where it was found before.

    Raises:
        InvalidRecipe: the data does not fit the recipe, or the device cannot do what it says.
        BaseNotFound, MissingDependency: the base, the data or a tracker is not here.
    """
    say = (reporter or Reporter(quiet=True)).note
    if not isinstance(recipe, Recipe):
        from lorary.trainer.tasks.shared import prepare_shared  # is made of runs of this module

        return prepare_shared(recipe, reporter)
    recipe = resolve_shape(resolve_auto(recipe))
    check_plan(recipe)
    check_optimizer(recipe.training)
    check_trackers(recipe.training.trackers)
    kind_class = kind_of(recipe)
    base = base or find_base(recipe.base, progress=say)
    tokenizer = load_tokenizer(base, needs_end=kind_class.needs_end)
    builder = PromptBuilder(tokenizer)
    splits = load_splits(recipe)
    recipe = with_served_template(recipe, builder, splits.test)
    kind = kind_class(recipe, base, tokenizer, builder)
    train_rows, too_long = kind.encode(splits.train)
    validation_rows, too_long_too = kind.encode(splits.validation, is_held_out=True)
    kind.check(splits.test)
    invocation: tuple[int, ...] = ()
    if recipe.method.name == "alora":
        text = recipe.method.invocation
        invocation = invocation_ids(text, builder, pad_id=int(tokenizer.pad_token_id))
        rows: Iterable[Any] = itertools.chain(train_rows, validation_rows)
        check_rows(rows, text, invocation)
        check_prompts(map(Encoder(builder, kind.task).prompt, splits.test), text, invocation)
    return Prepared(
        recipe=recipe,
        base=base,
        tokenizer=tokenizer,
        builder=builder,
        kind=kind,
        splits=splits,
        train_rows=train_rows,
        validation_rows=validation_rows,
        num_too_long=too_long + too_long_too,
        invocation=invocation,
    )


def read_runs(run: Prepared, beside: Sequence[Path]) -> list[OtherRun]:
    """Read what other runs did to the weights of this one's base; before any work.

    Raises:
        InvalidRequest: the recipe asks for no report to show them in, or a folder has none.
        IncompatibleAdapter: one is of another base.
    """
    from lorary.trainer.report.ranks import read_run

    if beside and not run.recipe.evaluation.report:
        raise InvalidRequest(
            "--beside shows other runs in the report, and evaluation.report is false; leave one of them out.",
            field="beside",
        )
    return [read_run(folder, run.base.card.fingerprint) for folder in beside]


def resolve_auto(recipe: Recipe) -> Recipe:
    """Return the recipe with device and dtype decided for this machine."""
    import torch

    training = recipe.training
    device = training.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise InvalidRecipe(f"training.device is '{device}', which torch does not know.") from error
    dtype: Literal["auto", "bfloat16", "float32"] = training.dtype
    if dtype == "auto":
        # An encoder is small, and torch's attention is slow backward in bfloat16 on a CPU.
        is_slow = device == "cpu" and recipe.task.kind not in SERVED_KINDS
        is_half = default_dtype(device) == torch.bfloat16 and not is_slow
        dtype = "bfloat16" if is_half else "float32"
    return replace(recipe, training=replace(training, device=device, dtype=dtype))


def train(
    recipe: Recipe | TasksRecipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
    origin: Mapping[str, Any] | None = None,
    beside: Sequence[Path] = (),
) -> Manifest:
    """Train, evaluate and write an adapter.

    Args:
        recipe: what to do; of several tasks for a shared adapter.
        output: folder to make; it appears only when everything in it is done.
        resume: go on from the newest checkpoint of the same recipe, base and data.
        force: replace an earlier output; with ``resume``, go on from a checkpoint of another recipe,
            base or data, too, which the manifest then says.
        reporter: where progress goes.
        origin: what the manifest shall say besides about where the recipe comes from.
        beside: outputs of other runs on this base, whose changes of weights the report shows with this one's.

    Raises:
        AlreadyExists, InvalidRecipe, InvalidRequest, IncompatibleAdapter, TrainingFailed, Cancelled,
        StorageError, BaseNotFound, MissingDependency: each says what to do.
    """
    reporter = reporter or Reporter()
    started = time.monotonic()
    check_output(output, force=force)
    run = prepare(recipe, reporter)
    others = read_runs(run, beside)
    checkpoints = checkpoints_of(output)
    resume_from = (
        newest_checkpoint(checkpoints, run.identity, allow_other=force) if resume else None
    )
    resumed = _resumed_facts(resume_from, run.identity)
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    reporter.note(_headline(run))
    method, fitted = fit_adapter(run, output, resume_from, reporter)
    fitted_at = time.monotonic()
    answered = _answers(run, method, reporter)
    evaluated_at = time.monotonic()
    manifest: list[Manifest] = []

    def fill(folder: Path) -> None:
        facts = {
            "seconds": round(time.monotonic() - started, 1),
            "fit_seconds": round(fitted_at - started, 1),
            "evaluate_seconds": round(evaluated_at - fitted_at, 1),
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "num_tokens": fitted.num_tokens,
            "num_processes": processes.num_processes(),
            "peak_memory_bytes": peak_memory_bytes(run.recipe.training.device),
            **resumed,
            "num_trainable": fitted.num_trainable,
            **(origin or {}),
        }
        manifest.append(_fill(run, folder, method, fitted, answered, facts, others))

    write_output(output, fill)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return manifest[0]


def assist(
    recipe: Recipe | TasksRecipe, output: Path, *, resume: bool = False, force: bool = False
) -> None:
    """Train beside the process that runs ``train``, which evaluates and writes; see ``processes``.

    Raises:
        What ``train`` raises up to the end of the fit.
    """
    quiet = Reporter(quiet=True)
    run = prepare(recipe, quiet)
    resume_from = None
    if resume:
        resume_from = newest_checkpoint(checkpoints_of(output), run.identity, allow_other=force)
    fit_adapter(run, output, resume_from, quiet)


def checkpoints_of(output: Path) -> Path:
    """Return where the checkpoints of the run that makes ``output`` are."""
    return output.with_name(f"{output.name}.checkpoints")


def _resumed_facts(checkpoint: Path | None, identity: str) -> dict[str, Any]:
    """Return what the manifest says about a checkpoint that a run went on from."""
    if checkpoint is None:
        return {}
    is_same = identity_of(checkpoint) == identity
    return {"resumed_from": {"step": step_of(checkpoint), "is_same_run": is_same}}


def fit_adapter(
    run: Prepared,
    output: Path,
    resume_from: Path | None,
    reporter: Reporter,
    watch: Callable[[float], None] | None = None,
) -> tuple[Attached, Fit]:
    """Load the base, attach a fresh adapter and fit it; checkpoints go beside ``output``.

    ``watch`` is told every validation loss; what it raises ends the fit and goes through.

    Returns:
        The method, its model with the best step's weights, and what the fit did.
    """
    from transformers import set_seed

    from lorary.trainer.fit import fit
    from lorary.trainer.methods.attach import attach
    from lorary.trainer.methods.method import Setting

    training = run.recipe.training
    set_seed(training.seed)
    model, heads = run.kind.load(dtype_of(run.recipe))
    method = attach(
        model,
        run.recipe.method,
        gradient_checkpointing=training.gradient_checkpointing,
        setting=Setting(
            base=run.base,
            rows=run.train_rows,
            max_steps=training.max_steps,
            task_type=run.kind.peft_task,
            invocation=run.invocation,
            heads=tuple(heads),
        ),
    )
    if training.packing:
        check_isolation(method.model)
    fitted = fit(
        method,
        run.kind,
        run.recipe,
        train_rows=run.train_rows,
        validation_rows=run.validation_rows,
        checkpoints=checkpoints_of(output),
        identity=run.identity,
        resume_from=resume_from,
        reporter=reporter,
        watch=watch,
    )
    return method, fitted


def _answers(run: Prepared, method: Attached, reporter: Reporter) -> dict[str, Answered]:
    """Measure the adapter and the base under it on the test examples of each task.

    Where more was trained than is published, that is measured first, and then cut.
    """
    uncut: dict[str, Evaluation] = {}
    if method.is_cut_afterwards:
        uncut = {
            name: _evaluate(part, method.model, reporter, "what was trained", name)
            for name, part in run.parts.items()
        }
        reporter.note(f"finding the best adapter of rank {run.recipe.method.rank} in every layer")
        method.cut()
    answered = {}
    for name, part in run.parts.items():
        after = _evaluate(part, method.model, reporter, "adapter", name)
        before = None
        if not part.recipe.evaluation.skip_base:
            with method.model.disable_adapter():
                before = _evaluate(part, method.model, reporter, "base", name)
        answered[name] = Answered.of(part.recipe, part.splits, before, after, uncut.get(name))
    return answered


def _evaluate(run: Prepared, model: Any, reporter: Reporter, who: str, task: str) -> Evaluation:
    """Measure a model as it is on the test examples of one task."""
    test = run.splits.test
    with reporter.phase(f"evaluating {who}{f' on {task}' if task else ''}", len(test)) as advance:
        found: Evaluation = run.kind.evaluate(model, test, lambda count: advance(count, ""))
    return found


def _fill(
    run: Prepared,
    folder: Path,
    method: Attached,
    fitted: Fit,
    answered: Mapping[str, Answered],
    facts: dict[str, Any],
    others: Sequence[OtherRun],
) -> Manifest:
    """Write everything of the output folder."""
    import torch

    from lorary.trainer.report.inside import look_inside

    recipe = run.recipe
    uncut = uncut_figures_of(answered)
    if uncut is not None:
        facts["uncut"] = uncut_facts(uncut, method.model)
    facts["conversion_error"] = method.save(folder, run.base)
    quantization, device = run.kind.formats, recipe.training.device
    probes = golden_probes(
        folder,
        run.base,
        _probed(run),
        quantization=quantization,
        device=device,
    )
    made = {
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "hardware": hardware(),
        "loss_curve": loss_curve(fitted.history),
        "golden_logits": golden_logits(
            folder,
            run.base,
            probes,
            recorded=quantization if isinstance(quantization, str) else "by a plan",
            device=device,
        ),
        **plan_facts(quantization),
    }
    manifest = build_manifest(
        run,
        method=method.describe(),
        probes=probes,
        metrics=figures_of(answered),
        training={**facts, **made},
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    write_report(
        folder / "report",
        recipe=recipe,
        manifest=manifest,
        answered=answered,
        history=fitted.history,
        best_step=fitted.best_step,
        inside=look_inside(
            run, method.model, answered, folder / "adapter_model.safetensors", others
        )
        if recipe.evaluation.report
        else None,
        uncut=uncut,
    )
    return manifest


def _probed(run: Prepared) -> list[list[int]]:
    """Return the held-out prompts that servers replay, as many of each task."""
    if not run.kind.has_probes:
        return []
    num_probes = -(-run.recipe.evaluation.num_golden_probes // len(run.parts))
    return [
        Encoder(part.builder, part.task).prompt(example)
        for part in run.parts.values()
        for example in part.splits.test[:num_probes]
    ]


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Return the dtype that a resolved recipe computes in."""
    import torch

    return torch.bfloat16 if recipe.training.dtype == "bfloat16" else torch.float32


def _headline(run: Prepared) -> str:
    """Say in one line what is about to happen."""
    training, method = run.recipe.training, run.recipe.method
    rows = len(run.train_rows)
    mean = sum(row_lengths(run.train_rows)) / rows
    return (
        f"{run.recipe.name}: {method.name} rank {method.rank} on {run.base.name} "
        f"({method.base_quantization}, {training.dtype}, {training.device}), {training.max_steps} "
        f"steps of {training.batch_size * training.gradient_accumulation} rows, {rows} rows of "
        f"{mean:.0f} tokens, {len(run.splits.test)} held out"
    )
