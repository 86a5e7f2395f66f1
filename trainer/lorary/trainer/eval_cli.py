"""``lorary eval REF …``: adapters measured again, beside their base, on the same held-out rows."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorary.errors import InvalidRequest, MissingDependency
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_options import JsonOption, RegistryOption
from lorary.registry.cli_support import console, print_json, run, warn
from lorary.trainer.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.registry.requirements import Requirement
    from lorary.trainer.measure import Exam, Measured, Subject

_HARNESS_BATCH = 8

app = typer.Typer(
    name="eval",
    help="Measure adapters beside their base.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(
    epilog="Examples: lorary eval sentiment@prod --quantization nf4 · lorary eval runs/a "
    "--data rows.jsonl --column text=review --require 'accuracy>=0.85' · lorary eval a@prod b@prod"
)
def evaluate(
    refs: Annotated[
        list[str],
        typer.Argument(metavar="REF…", help="name@prod, name@3 …, or a folder with a manifest."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Rows (.jsonl, .csv, …), or a recipe (.yaml) whose task and held-out rows are used; "
            "may be repeated. By default what each adapter's own training held out."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT=COLUMN", help="Of a file of rows; may be repeated."),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    base: Annotated[
        str | None, typer.Option(help="Folder or name of the base; by default the manifest's.")
    ] = None,
    quantization: Annotated[
        Literal["none", "int8", "nf4"] | None,
        typer.Option(help="Of the base; by default what the first adapter was trained on."),
    ] = None,
    metric: Annotated[
        Literal["accuracy", "rouge", "bleu", "exact_match", "perplexity"] | None,
        typer.Option(help="By default the recipe's."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows of each task; 0 is all.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts at a time.")] = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Of the rows, for the intervals; 0 makes none.")
    ] = 1000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval",
            metavar="TASK",
            help="Instead of rows, a task of lm-evaluation-harness; may be repeated.",
        ),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option("--lm-eval-path", help="Folder with further tasks of its kind, as YAML."),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REQUIREMENT",
            help="accuracy>=0.85, accuracy.gain.low>0 …; exit code 4 if an adapter does not meet it.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto is cuda where there is one.")] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Of the arithmetic; auto is what the device does well."),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default all this process may use.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure adapters and their base on the same rows, with intervals of the difference.

    Several adapters give a table of each adapter on each task: what one has forgotten of another's.
    """
    requirements = _requirements(require or [])
    columns = _columns(column or [])
    use_threads(threads)
    missing = [name for name in ("torch", "transformers", "peft") if not find_spec(name)]
    if missing:
        raise MissingDependency(
            f"evaluation needs '{missing[0]}', which is not installed. Run: pip install 'lorary[train]'"
        )
    from lorary.trainer.measure import adjusted, find_common_base, measure, open_subject
    from lorary.trainer.progress import Reporter

    subjects = [open_subject(ref, registry) for ref in dict.fromkeys(refs)]
    found = find_common_base(subjects, base)
    if lm_eval and data:
        raise InvalidRequest("--lm-eval and --data exclude each other.", field="lm-eval")
    where = _device(device)
    settings: dict[str, Any] = {
        "base": found,
        "quantization": quantization,
        "dtype": _dtype(dtype, where),
        "device": where,
        "reporter": Reporter(quiet=as_json),
    }
    if lm_eval:
        from lorary.trainer.bootstrap import Bootstrap
        from lorary.trainer.harness import measure_tasks

        bootstrap = Bootstrap(num_resamples=resamples, confidence=confidence, seed=seed)
        results = [
            *measure_tasks(
                subjects,
                lm_eval,
                tasks_folder=lm_eval_path,
                limit=limit,
                batch_size=batch_size or _HARNESS_BATCH,
                bootstrap=bootstrap,
                **settings,
            )
        ]
        _report(results, requirements, seed, as_json=as_json)
        return
    changes: dict[str, Any] = {"num_resamples": resamples, "confidence": confidence}
    changes |= {"metric": metric} if metric else {}
    changes |= {"batch_size": batch_size} if batch_size else {}
    exams = [adjusted(one, limit=limit, **changes) for one in _exams(subjects, data or [], columns)]
    for exam in exams:
        if exam.note:
            warn(exam.note)
    results = [*measure(subjects, exams, seed=seed, **settings)]
    _report(results, requirements, seed, as_json=as_json)


def _report(
    results: Sequence[Measured], requirements: Sequence[Requirement], seed: int, *, as_json: bool
) -> None:
    """Print the figures, and raise ``Refused`` if a requirement is not met."""
    if as_json:
        print_json({"results": results, "seed": seed})
    else:
        _print(results)
    _check(results, requirements)


def _exams(
    subjects: Sequence[Subject], data: Sequence[Path], columns: dict[str, str]
) -> list[Exam]:
    """Return what to measure with; a name stands for one exam."""
    from lorary.trainer.measure import exams_of, own_exams

    if not data:
        if columns:
            raise InvalidRequest("--column is for rows given with --data.", field="column")
        exams = [exam for subject in subjects for exam in own_exams(subject)]
    else:
        exams = [exam for path in data for exam in exams_of(path, subjects[0], columns)]
    names = [exam.name for exam in exams]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InvalidRequest(f"two tasks are called '{repeated}'; rename one.", field="data")
    return exams


def _requirements(texts: Sequence[str]) -> list[Requirement]:
    from lorary.registry.requirements import parse_requirement

    found = [parse_requirement(text) for text in texts]
    for one in found:
        if one.holder:
            raise InvalidRequest(
                f"requirement '{one.text}' compares with '{one.holder}'; here it is compared with a "
                "number, such as accuracy>=0.85 or accuracy.gain.low>0.",
                field="require",
            )
    return found


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise InvalidRequest(f"--column '{pair}' is not INPUT=COLUMN.", field="column")
        found[name] = column
    return found


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return asked


def _dtype(asked: str, device: str) -> Any:
    import torch

    from lorary.bases.load import default_dtype

    return default_dtype(device) if asked == "auto" else getattr(torch, asked)


def _print(results: Sequence[Measured]) -> None:
    """Print one table of all figures, or of primary figures where there are several adapters."""
    from lorary.trainer.figures_table import figures_table
    from lorary.trainer.forgetting import ForgettingTable

    screen = console()
    adapters = list(dict.fromkeys(one.adapter for one in results))
    if len(adapters) == 1:
        for one in results:
            title = (
                f"{one.adapter} on {one.exam}: {one.metrics.num_examples} rows, base {one.base}, "
                f"quantization {one.quantization}, {one.seconds:.0f} s"
            )
            screen.print(figures_table(one.metrics, title))
        return
    measured = ((one.adapter, one.exam, one.metrics) for one in results)
    screen.print(ForgettingTable.of(results[0].base, measured).rendered())


def _check(results: Sequence[Measured], requirements: Sequence[Requirement]) -> None:
    """Raise ``Refused`` unless every adapter meets every requirement on every task."""
    from lorary.registry.requirements import check_figures
    from lorary.registry.requirements import measure as compare

    for one in results:
        figures = [
            compare(each, 0, alias="", state={}, metrics_of=lambda _, m=one.metrics: m.figures())  # type: ignore[misc]
            for each in requirements
        ]
        check_figures(f"{one.adapter} on {one.exam}", figures)


def main() -> None:
    """Run as ``python -m lorary.trainer.eval_cli``."""
    run(app, prog_name="lorary eval")


if __name__ == "__main__":
    main()
