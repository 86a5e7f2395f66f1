"""``lorary train RECIPE``: one command from a recipe to an adapter folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorary.errors import MissingDependency
from lorary.registry.cli_support import console, print_json, run, table
from lorary.trainer import processes
from lorary.trainer.figures_table import figures_table
from lorary.trainer.recipe_file import load_recipe, recipe_dict
from lorary.trainer.threads import use_threads

if TYPE_CHECKING:
    from lorary.registry import Manifest
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
    checked = load_recipe(recipe, overrides or [])
    folder = output or Path("runs") / checked.name
    use_threads(threads)
    missing = [name for name in ("torch", "transformers", "peft") if not find_spec(name)]
    if missing:
        raise MissingDependency(
            f"training needs '{missing[0]}', which is not installed. Run: pip install 'lorary[train]'"
        )
    from lorary.trainer.output import check_output
    from lorary.trainer.progress import Reporter
    from lorary.trainer.train import assist, prepare, read_runs
    from lorary.trainer.train import train as train_adapter

    reporter = Reporter()
    if show_preview:
        from lorary.trainer.preview import preview

        found = preview(checked, reporter)
        if as_json:
            print_json(found.as_json())
        else:
            for part in found.renderables():
                console().print(part)
        return
    if dry_run:
        from lorary.trainer.forecast import forecast

        prepared = prepare(checked, reporter)
        read_runs(prepared, beside or [])
        _print_plan(prepared, folder, forecast(prepared, reporter), as_json=as_json)
        return
    if not processes.is_first():
        assist(checked, folder, resume=resume, force=force)
        return
    check_output(folder, force=force)
    manifest = train_adapter(
        checked, folder, resume=resume, force=force, reporter=reporter, beside=beside or []
    )
    _print_result(manifest, folder, as_json=as_json)


def _print_plan(
    prepared: Prepared, folder: Path, forecast: dict[str, Any], *, as_json: bool
) -> None:
    """Print what a run would do and take."""
    from lorary.trainer.token_store import row_lengths

    splits, recipe = prepared.splits, prepared.recipe
    facts: dict[str, Any] = {
        "base": prepared.base.name,
        "fingerprint": prepared.base.card.fingerprint,
        "train": len(prepared.train_rows),
        "validation": len(prepared.validation_rows),
        "test": len(splits.test),
        "too long, left out": prepared.num_too_long,
        "longest row (tokens)": max(row_lengths(prepared.train_rows)),
        "steps": recipe.training.max_steps,
        "output": str(folder),
    }
    if as_json:
        print_json({"plan": facts, "forecast": forecast, "recipe": recipe_dict(recipe)})
        return
    from lorary.trainer.forecast import forecast_rows

    facts |= forecast_rows(forecast)
    rows = table("what", "value", title=f"{recipe.name}: nothing was trained or written")
    for name, value in facts.items():
        rows.add_row(name, str(value))
    console().print(rows)


def _print_result(manifest: Manifest, folder: Path, *, as_json: bool) -> None:
    """Print the figures of base and adapter side by side, and what to do next."""
    if as_json:
        print_json(manifest)
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
    name = manifest.training["recipe"]["name"]
    console().print(f"next: registry push {folder} {name} --alias prod", highlight=False)


def main() -> None:
    """Run as ``python -m lorary.trainer``."""
    run(app, prog_name="lorary train")
