"""Measure adapters again: each on each task, beside their base, on the same held-out rows.

Several adapters on several tasks is the *forgetting table*: what an adapter does to the tasks it was not
trained for is its figure there beside the base's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.bases import Base, PromptBuilder, find_base
from lorary.bases.load import load_model, load_tokenizer
from lorary.errors import (
    CorruptArtifact,
    IncompatibleAdapter,
    InvalidRecipe,
    InvalidRequest,
    LoraryError,
)
from lorary.registry import Manifest, Registry
from lorary.registry.folder import CONFIG_FILE, read_bytes, scan_folder
from lorary.registry.manifest import SERVED_KINDS, Metrics
from lorary.trainer.data import load_splits
from lorary.trainer.encoding import Encoder
from lorary.trainer.kinds import kind_of
from lorary.trainer.methods.alora import check_prompts
from lorary.trainer.metrics import metrics_of
from lorary.trainer.quiet import quiet_libraries
from lorary.trainer.recipe import DataRecipe, Recipe, TaskRecipe
from lorary.trainer.recipe_file import build_any_recipe, load_any_recipe
from lorary.trainer.served_template import with_served_template
from lorary.trainer.sources import read_examples, resolve_shape
from lorary.trainer.tasks.recipe import recipes_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lorary.bases.load import Quantization
    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.examples import Example
    from lorary.trainer.progress import Reporter
    from lorary.trainer.tasks.recipe import TasksRecipe

_RECIPES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An adapter to be measured: its files, checked, and what its manifest says.

    Attributes:
        ref: as it was asked for.
        digest: of the version; empty for a folder that no registry keeps.
    """

    ref: str
    folder: Path
    manifest: Manifest
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """A task and the rows that measure it.

    Attributes:
        name: for people; an adapter's ref, a recipe's name, or a file.
        recipe: task, metric and batch size.
        examples: to be answered.
        note: what a reader of the figures should know; empty if nothing.
    """

    name: str
    recipe: Recipe
    examples: tuple[Example, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures of one adapter in one exam, beside those of its base."""

    adapter: str
    digest: str
    exam: str
    base: str
    quantization: str
    metrics: Metrics
    seconds: float


def open_subject(ref: str, registry: str) -> Subject:
    """Find an adapter: a folder with ``adapter_config.json``, or a ref of a registry.

    Raises:
        AdapterNotFound, InvalidRef, CorruptArtifact, StorageError: as the registry says.
        InvalidRequest: a folder without manifest, of which neither base nor task is known.
    """
    folder = Path(ref).expanduser()
    if (folder / CONFIG_FILE).is_file():
        files = scan_folder(folder)
        if not files.has_manifest:
            raise InvalidRequest(
                f"'{folder}' has no manifest.json, so its base and task are not known. Push it to a "
                "registry with --base, or train it with lorary train.",
                field="ref",
            )
        return Subject(
            ref=ref, folder=folder, manifest=Manifest.from_json(read_bytes(files.manifest))
        )
    opened = Registry.open(registry)
    resolved = opened.resolve(ref)
    return Subject(
        ref=f"{resolved.name}@{resolved.version}",
        folder=opened.fetch(resolved),
        manifest=opened.manifest(resolved),
        digest=resolved.digest,
    )


def own_exams(subject: Subject) -> list[Exam]:
    """Return the tasks that an adapter was trained for, nearly always one, with the rows that were held out.

    Raises:
        InvalidRequest: the manifest has no recipe that this Lorary reads.
        InvalidRecipe, MissingDependency: its data cannot be read here.
    """
    data = subject.manifest.data
    return [
        _own_exam(
            f"{subject.ref}:{task}" if task else subject.ref,
            recipe,
            data.get("tasks", {}).get(task, {}) if task else data,
        )
        for task, recipe in recipes_of(_own_recipe(subject)).items()
    ]


def _own_exam(name: str, recipe: Recipe, data: Mapping[str, Any]) -> Exam:
    """Return one task with its held-out rows; ``data`` is what the manifest says of them."""
    splits = load_splits(recipe)
    known = data.get("fingerprint")
    note = ""
    if known is not None and known != splits.fingerprint:
        note = (
            f"the data of {name} is no longer what it was trained on: its held-out rows are "
            "others, and it may have seen some of them"
        )
    return Exam(name=name, recipe=recipe, examples=splits.test, note=note)


def exams_of(data: Path, subject: Subject, columns: Mapping[str, str]) -> list[Exam]:
    """Return the exams that a recipe or a file of rows describes, one for each task.

    A recipe (.yaml) brings its own tasks and holds out its own rows. A file of rows is taken whole, with
    the task of ``subject``.

    Raises:
        InvalidRecipe: it cannot be read, or a row has a label that the task does not know.
        InvalidRequest: the subject has no task template.
    """
    if data.suffix in _RECIPES:
        named = load_any_recipe(data)
        recipes = {task: resolve_shape(one) for task, one in recipes_of(named).items()}
        return [
            Exam(
                name=f"{named.name}:{task}" if task else named.name,
                recipe=one,
                examples=load_splits(one).test,
            )
            for task, one in recipes.items()
        ]
    recipe = _recipe_for(subject, data, columns)
    examples = tuple(read_examples(recipe.data))
    labels = recipe.task.labels
    unknown = sorted({one.target for one in examples} - set(labels)) if labels else []
    if unknown:
        raise InvalidRecipe(
            f"'{data}' has the label '{unknown[0]}', which is not one of {subject.ref}'s: "
            f"{', '.join(labels)}."
        )
    return [Exam(name=data.name, recipe=recipe, examples=examples)]


def adjusted(exam: Exam, *, limit: int, **evaluation: Any) -> Exam:
    """Return the exam with its first ``limit`` rows (0: all) and other keys of ``evaluation``.

    Raises:
        InvalidRecipe: a value out of range, or a metric that does not fit the task.
    """
    changed = replace(exam.recipe.evaluation, **evaluation)
    return replace(
        exam,
        recipe=replace(exam.recipe, evaluation=changed),
        examples=exam.examples[:limit] if limit else exam.examples,
    )


def find_common_base(subjects: Sequence[Subject], named: str | None) -> Base:
    """Return the one base of all these adapters, with the fingerprint that their manifests name.

    Raises:
        BaseNotFound: it is not here; name a folder that holds it.
        IncompatibleAdapter: they have several bases, or the base found is another one.
    """
    first = subjects[0].manifest
    other = next(
        (s for s in subjects if s.manifest.base.fingerprint != first.base.fingerprint), None
    )
    if other is not None:
        raise IncompatibleAdapter(
            f"{subjects[0].ref} has base '{first.base.name}' and {other.ref} has "
            f"'{other.manifest.base.name}'; measure adapters of one base at a time."
        )
    recipe = first.training.get("recipe")
    # What the recipe calls it is found as it was then, also where that is a folder.
    trained_on = recipe.get("base") if isinstance(recipe, dict) else None
    base = find_base(named or trained_on or first.base.name)
    if base.card.fingerprint != first.base.fingerprint:
        raise IncompatibleAdapter(
            f"base '{base.name}' has fingerprint {base.card.fingerprint[:19]}…, and {subjects[0].ref} "
            f"was trained on {first.base.fingerprint[:19]}…. Name the right one with --base."
        )
    return base


def measure(
    subjects: Sequence[Subject],
    exams: Sequence[Exam],
    *,
    base: Base,
    quantization: Quantization | Mapping[str, Quantization] | None,
    dtype: Any,
    device: str,
    seed: int,
    reporter: Reporter,
) -> Iterator[Measured]:
    """Let every adapter and the base take every exam; yields one adapter's figures at a time.

    Args:
        subjects: adapters of ``base``.
        exams: each with its rows.
        base: loaded once.
        quantization: of the base, or of each of its layers; ``None`` is what the first adapter was trained on.
        dtype: torch dtype of what is not quantized.
        device: a torch device.
        seed: of the resamples.
        reporter: where progress goes.

    Raises:
        InvalidRequest: an exam has no rows, or a row does not fit its template.
        InvalidRecipe: an adapter is an aLoRA, and a row's prompt lacks its invocation.
        CorruptArtifact: PEFT cannot read an adapter.
        ConfigError, MissingDependency: the base cannot be loaded so.
    """
    for exam in exams:
        if not exam.examples:
            raise InvalidRequest(f"'{exam.name}' has no rows to measure with.", field="data")
    family = _common_family(subjects, exams)
    # Other kinds have tokenizers without an end token, and a head that is drawn, not loaded.
    is_served = family in SERVED_KINDS
    if is_served:
        loaded = load_for(subjects, base, quantization=quantization, dtype=dtype, device=device)
    else:
        loaded = _load_kind(exams[0].recipe, base, quantization, dtype, device)
    tokenizer, builder = loaded.tokenizer, PromptBuilder(loaded.tokenizer)
    if is_served:
        exams = [
            replace(one, recipe=with_served_template(one.recipe, builder, one.examples))
            for one in exams
        ]
    for subject in subjects:
        invocation = subject.manifest.method.invocation_tokens
        if invocation:
            # PEFT would leave the adapter off, and the base's figures would stand under its name.
            text = tokenizer.decode(list(invocation))
            for exam in exams:
                encoder = Encoder(builder, exam.recipe.task.to_manifest())
                check_prompts(map(encoder.prompt, exam.examples), text, invocation)
    before: dict[str, Evaluation] = {}
    for subject, wrapped in attached(loaded.model, subjects):
        for exam in exams:
            started = time.monotonic()

            def answer(who: str, wrapped: Any = wrapped, exam: Exam = exam) -> Evaluation:
                kind = kind_of(exam.recipe)(exam.recipe, base, tokenizer, builder)
                kind.check(exam.examples)
                total = len(exam.examples)
                with reporter.phase(f"{who} on {exam.name}", total) as advance:
                    return kind.evaluate(wrapped, exam.examples, lambda count: advance(count, ""))

            if exam.name not in before:
                with wrapped.disable_adapter():
                    before[exam.name] = answer(base.name)
            metrics = metrics_of(exam.recipe, before[exam.name], answer(subject.ref), seed)
            yield Measured(
                adapter=subject.ref,
                digest=subject.digest,
                exam=exam.name,
                base=base.name,
                quantization=loaded.quantization,
                metrics=metrics,
                seconds=round(time.monotonic() - started, 1),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A base in memory."""

    model: Any
    tokenizer: Any
    quantization: str


def load_for(
    subjects: Sequence[Subject],
    base: Base,
    *,
    quantization: Quantization | Mapping[str, Quantization] | None,
    dtype: Any,
    device: str,
) -> Loaded:
    """Load the base of these adapters; ``quantization`` ``None`` is what the first was trained on.

    Raises:
        ConfigError, MissingDependency, CorruptArtifact: as ``load_model``.
    """
    kept: Any = quantization or subjects[0].manifest.base.quantization
    model = load_model(
        base, quantization=kept, dtype=dtype, device=device, attn_implementation="sdpa"
    )
    named = kept if isinstance(kept, str) else "by a plan"
    return Loaded(model=model, tokenizer=load_tokenizer(base), quantization=named)


def _load_kind(
    recipe: Recipe,
    base: Base,
    quantization: Quantization | Mapping[str, Quantization] | None,
    dtype: Any,
    device: str,
) -> Loaded:
    """Load a base under the head of a kind that servers do not serve.

    The head is drawn with the seed of the training, so that the base answers as it did then.
    """
    from transformers import set_seed

    if quantization not in (None, "none"):
        raise InvalidRequest(
            f"quantization is {quantization} for a {recipe.task.kind}, whose base is used whole.",
            field="quantization",
        )
    made = kind_of(recipe)
    tokenizer = load_tokenizer(base, needs_end=made.needs_end)
    recipe = replace(recipe, training=replace(recipe.training, device=device))
    set_seed(recipe.training.seed)
    model, _ = made(recipe, base, tokenizer, PromptBuilder(tokenizer)).load(dtype)
    return Loaded(model=model, tokenizer=tokenizer, quantization="none")


def _common_family(subjects: Sequence[Subject], exams: Sequence[Exam]) -> str:
    """Return the task kind of all; those that servers serve share one model, and count as one.

    Raises:
        InvalidRequest: there are several.
    """
    kinds = {
        **{one.ref: one.manifest.task.kind for one in subjects},
        **{one.name: one.recipe.task.kind for one in exams},
    }
    families = {"generation" if kind in SERVED_KINDS else kind for kind in kinds.values()}
    if len(families) > 1:
        shown = ", ".join(f"{name} is a {kind}" for name, kind in kinds.items())
        raise InvalidRequest(
            f"these do not share a model: {shown}. Measure each kind apart.", field="ref"
        )
    return families.pop()


def attached(model: Any, subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Any]]:
    """Yield every adapter with the base under it, one after the other on the same weights.

    Raises:
        CorruptArtifact: PEFT cannot read an adapter.
    """
    for subject in subjects:
        wrapped = _attach(model, subject)
        yield subject, wrapped
        model = wrapped.unload()


def _attach(model: Any, subject: Subject) -> Any:
    """Put an adapter's weights onto the base."""
    import peft

    try:
        with quiet_libraries():
            return peft.PeftModel.from_pretrained(model, subject.folder).eval()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptArtifact(f"PEFT cannot load {subject.ref}: {error}") from error


def _own_recipe(subject: Subject) -> Recipe | TasksRecipe:
    raw = subject.manifest.training.get("recipe")
    if not isinstance(raw, dict):
        raise InvalidRequest(
            f"the manifest of {subject.ref} has no recipe, so the rows held out from its training "
            "are not known. Give rows, or a recipe, with --data.",
            field="data",
        )
    try:
        return build_any_recipe(raw)
    except LoraryError as error:
        raise InvalidRequest(
            f"the recipe in the manifest of {subject.ref} is not one that this Lorary reads: {error} "
            "Give rows, or a recipe, with --data.",
            field="data",
        ) from error


def _recipe_for(subject: Subject, data: Path, columns: Mapping[str, str]) -> Recipe:
    """Return a recipe with the adapter's task over a file's rows."""
    source = DataRecipe(source="file", path=str(data), columns=dict(columns))
    task = subject.manifest.task
    if isinstance(subject.manifest.training.get("recipe"), dict):
        own = _own_recipe(subject)
        if not isinstance(own, Recipe):
            raise InvalidRequest(
                f"{subject.ref} has several tasks ({', '.join(own.tasks)}), so whose rows '{data}' has is "
                "not known. Name a recipe, whose task is used, with --data.",
                field="data",
            )
        return replace(own, data=replace(source, shape=own.data.shape))
    if task.template is None:
        raise InvalidRequest(
            f"{subject.ref} has neither a task template nor a recipe, so rows cannot become prompts. "
            "Name a recipe, whose task is used, with --data.",
            field="data",
        )
    return Recipe(
        name="eval",
        base=subject.manifest.base.name,
        task=TaskRecipe(
            kind=task.kind,
            template=task.template,
            labels=task.labels,
            max_new_tokens=task.max_new_tokens,
            stop=task.stop,
        ),
        data=source,
    )
