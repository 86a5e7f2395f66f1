"""``lorary train RECIPE``: one command from a recipe to an adapter folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorary.errors import InvalidRequest, MissingDependency
from lorary.registry.cli_support import console, print_json, run, table
from lorary.trainer import processes
from lorary.trainer.figures_table import figures_table
from lorary.trainer.recipe_file import load_any_recipe
from lorary.trainer.tasks.recipe import TasksRecipe, about_task, recipes_of
from lorary.trainer.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorary.registry import Manifest
    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.tasks.separate import SeparateResult
    from lorary.trainer.train import Prepared

app = typer.Typer(
    name="train",
    help="Train a LoRA adapter from a recipe.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(
    epilog="Examples: lorary train recipes/sentiment.yaml --set training.max_steps=40; lorary train mine.yaml --preview; "
    "lorary train mine.yaml --set method.name=full --output runs/full --beside runs/mine"
)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to make; by default runs/<recipe's name>.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe key; may be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace the output of an earlier run; with --resume, go on from a checkpoint of "
            "another recipe, base or data, too.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, say how much memory and time it will take, write nothing.",
        ),
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="OUTPUT",
            help="Output of another run on this base: the report shows the ranks of both changes side by "
            "side; may be repeated.",
        ),
    ] = None,
    show_preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="Show lengths and the first examples, learned tokens in colour; train nothing.",
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default all this process may use.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the manifest (plan, preview) as JSON instead of a table."
        ),
    ] = False,
) -> None:
    """Train an adapter, measure it against its base, and write a PEFT folder with a manifest."""
    checked = load_any_recipe(recipe, overrides or [])
    folder = output or Path("runs") / checked.name
    use_threads(threads)
    missing = [name for name in ("torch", "transformers", "peft") if not find_spec(name)]
    if missing:
        raise MissingDependency(
            f"training needs '{missing[0]}', which is not installed. Run: pip install 'lorary[train]'"
        )
    from lorary.trainer.output import check_output
    from lorary.trainer.progress import Reporter
    from lorary.trainer.train import assist
    from lorary.trainer.train import train as train_adapter

    reporter = Reporter()
    if show_preview:
        _preview(recipes_of(checked), reporter, as_json=as_json)
        return
    is_separate = isinstance(checked, TasksRecipe) and checked.adapters == "separate"
    if dry_run:
        planned: Mapping[str, Recipe | TasksRecipe] = (
            recipes_of(checked) if is_separate else {"": checked}
        )
        _plan(planned, folder, beside or [], reporter, as_json=as_json)
        return
    if isinstance(checked, TasksRecipe) and is_separate:
        from lorary.trainer.tasks.separate import train_separate

        if beside:
            raise InvalidRequest(
                "--beside is for a run of its own, and adapters: separate makes several; run each task "
                "from its own recipe to compare it.",
                field="beside",
            )
        result = train_separate(checked, folder, resume=resume, force=force, reporter=reporter)
        _print_separate(result, as_json=as_json)
        return
    if not processes.is_first():
        assist(checked, folder, resume=resume, force=force)
        return
    check_output(folder, force=force)
    manifest = train_adapter(
        checked, folder, resume=resume, force=force, reporter=reporter, beside=beside or []
    )
    _print_result(manifest, folder, as_json=as_json)


def _preview(recipes: Mapping[str, Recipe], reporter: Reporter, *, as_json: bool) -> None:
    """Print the rows of each task."""
    from lorary.trainer.preview import preview

    found = {}
    for name, one in recipes.items():
        with about_task(name):
            found[name] = preview(one, reporter)
    if as_json:
        shown = {name: one.as_json() for name, one in found.items()}
        print_json(shown.get("", {"tasks": shown}))
        return
    screen = console()
    for name, seen in found.items():
        if name:
            screen.rule(name, align="left")
        for part in seen.renderables():
            screen.print(part)


def _plan(
    recipes: Mapping[str, Recipe | TasksRecipe],
    folder: Path,
    beside: list[Path],
    reporter: Reporter,
    *,
    as_json: bool,
) -> None:
    """Print what each run would do and take."""
    from lorary.trainer.forecast import forecast
    from lorary.trainer.train import prepare, read_runs

    found = {}
    for name, one in recipes.items():
        with about_task(name):
            prepared = prepare(one, reporter)
            read_runs(prepared, beside)
            found[name] = (prepared, forecast(prepared, reporter))
    plans = {}
    for name, (prepared, forecasted) in found.items():
        place = folder.with_name(f"{folder.name}-{name}") if name else folder
        facts = _plan_facts(prepared, place)
        plans[name] = {"plan": facts, "forecast": forecasted, "recipe": prepared.recorded()}
        if not as_json:
            _print_plan(prepared.recipe.name, facts, forecasted)
    if as_json:
        print_json(plans.get("", {"tasks": plans}))


def _plan_facts(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Return what a run would do."""
    from lorary.trainer.token_store import row_lengths

    splits, recipe = prepared.splits, prepared.recipe
    return {
        "base": prepared.base.name,
        "fingerprint": prepared.base.card.fingerprint,
        **_tasks_facts(prepared),
        "train": len(prepared.train_rows),
        "validation": len(prepared.validation_rows),
        "test": len(splits.test),
        "too long, left out": prepared.num_too_long,
        "longest row (tokens)": max(row_lengths(prepared.train_rows)),
        "steps": recipe.training.max_steps,
        "output": str(folder),
    }


def _tasks_facts(prepared: Prepared) -> dict[str, str]:
    """Return what share of a run's batches each of several tasks has."""
    shares = getattr(prepared.train_rows, "shares", {})
    if not shares:
        return {}
    counts = {name: len(part.train_rows) for name, part in prepared.parts.items()}
    shown = [
        f"{name} {counts[name]} rows, {share:.1%} of batches" for name, share in shares.items()
    ]
    return {"tasks": "; ".join(shown)}


def _print_plan(name: str, facts: dict[str, Any], forecasted: dict[str, Any]) -> None:
    """Print what a run would do and take."""
    from lorary.trainer.forecast import forecast_rows

    rows = table("what", "value", title=f"{name}: nothing was trained or written")
    for what, value in (facts | forecast_rows(forecasted)).items():
        rows.add_row(what, str(value))
    console().print(rows)


def _print_result(manifest: Manifest, folder: Path, *, as_json: bool) -> None:
    """Print the figures of base and adapter side by side, and what to do next."""
    if as_json:
        print_json(json.loads(manifest.to_json()))
        return
    assert manifest.metrics is not None
    title = f"{folder} · {manifest.metrics.num_examples} held-out examples"
    console().print(figures_table(manifest.metrics, title))
    uncut = manifest.training.get("uncut")
    if uncut is not None and "kept_share" in uncut:
        primary = manifest.metrics.primary
        console().print(
            f"what was trained: {primary} {uncut['metrics'][primary]:.3f}; the adapter holds "
            f"{uncut['kept_share']:.1%} of its change, which takes rank {uncut['rank_90']:g} for 90 %",
            highlight=False,
        )
    if manifest.tasks:
        from lorary.trainer.report import read_forgetting

        console().print(read_forgetting(folder / "report").rendered())
    name = manifest.training["recipe"]["name"]
    console().print(f"next: registry push {folder} {name} --alias prod", highlight=False)


def _print_separate(result: SeparateResult, *, as_json: bool) -> None:
    """Print each adapter on each task, and what to do next."""
    if as_json:
        plain = {name: json.loads(one.to_json()) for name, one in result.manifests.items()}
        print_json({"forgetting": result.table.as_json(), "tasks": plain})
        return
    console().print(result.table.rendered())
    for name, folder in result.folders.items():
        adapter = result.manifests[name].training["recipe"]["name"]
        console().print(f"next: registry push {folder} {adapter} --alias prod", highlight=False)


def main() -> None:
    """Run as ``python -m lorary.trainer``."""
    run(app, prog_name="lorary train")
