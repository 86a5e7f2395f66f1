"""``lorary search RECIPE``: find better values of a recipe's keys, then train with the best."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorary.errors import ConfigError, MissingDependency
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_options import RegistryOption, open_registry
from lorary.registry.cli_support import console, print_json, table
from lorary.trainer.recipe_file import load_recipe, recipe_dict
from lorary.trainer.threads import use_threads

if TYPE_CHECKING:
    from lorary.registry.manifest import Manifest
    from lorary.registry.results import VersionInfo
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.search.run import SearchResult

app = typer.Typer(
    name="search",
    help="Search a recipe's space for the best values, and train with them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_EPILOG = (
    "Examples: lorary search recipes/sentiment.yaml "
    "--set 'search.space={method.rank: [4, 16], training.learning_rate: {low: 1e-4, high: 2e-3, log: true}}'"
    " · lorary search recipe.yaml --workers 2 --resume · lorary search recipe.yaml --push --alias canary"
)


@app.command(epilog=_EPILOG)
def search(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML recipe with a search section.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the retrained best; by default runs/<recipe's name>."),
    ] = None,
    study: Annotated[
        Path | None, typer.Option(help="Folder of the study; by default <output>.search.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe key; may be repeated."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Processes that run trials side by side.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study, or help who works on it.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Drop an earlier study and the output of an earlier run."),
    ] = False,
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Search only; best.yaml has the recipe to train.")
    ] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Push the retrained best under the recipe's name.")
    ] = False,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="With --push: move this alias to it.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of all workers together.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print trials and best as JSON instead of tables.")
    ] = False,
) -> None:
    """Run trials judged by validation loss alone, retrain the best as a normal run, publish it."""
    if no_train and (push or alias):
        raise ConfigError("--push and --alias publish the retrained best; remove --no-train.")
    if alias and not push:
        raise ConfigError("--alias needs --push, which makes the version it shall point at.")
    checked = load_recipe(recipe, overrides or [])
    folder = output or Path("runs") / checked.name
    study_folder = study or folder.with_name(f"{folder.name}.search")
    count = use_threads(threads)
    if workers > 1:
        count = use_threads(max(1, count // workers))
    missing = [name for name in ("torch", "transformers", "peft", "optuna") if not find_spec(name)]
    if missing:
        raise MissingDependency(
            f"searching needs '{missing[0]}', which is not installed. Run: pip install 'lorary[search]'"
        )
    from lorary.trainer.output import check_output
    from lorary.trainer.progress import Reporter
    from lorary.trainer.search.run import search as run_search
    from lorary.trainer.train import train

    reporter = Reporter()
    if not no_train:
        check_output(folder, force=force)
    result = run_search(
        checked, study_folder, workers=workers, resume=resume, force=force, reporter=reporter
    )
    manifest: Manifest | None = None
    version: VersionInfo | None = None
    if not no_train:
        manifest = train(
            result.recipe, folder, force=force, reporter=reporter, origin=result.origin
        )
    if push:
        version = _push(folder, result.recipe, alias or [], registry)
    _print(result, study_folder, folder, manifest, version, as_json=as_json)


def _push(folder: Path, recipe: Recipe, aliases: list[str], registry: str) -> VersionInfo:
    from lorary.bases import find_base

    card = find_base(recipe.base).card
    return open_registry(registry, create=True).push(
        folder, recipe.name, base=card, aliases=aliases
    )


def _print(
    result: SearchResult,
    study: Path,
    folder: Path,
    manifest: Manifest | None,
    version: VersionInfo | None,
    *,
    as_json: bool,
) -> None:
    best = result.best
    if as_json:
        facts: dict[str, Any] = {
            "study": str(study),
            "trials": result.trials,
            "best": best,
            "importances": result.importances,
            "recipe": recipe_dict(result.recipe),
            "output": str(folder) if manifest else None,
            "metrics": manifest.metrics if manifest else None,
            "version": version,
            "seconds": result.seconds,
        }
        print_json(facts)
        return
    states = [trial.state for trial in result.trials]
    rows = table(
        "key", "best value", "importance", title=_title(len(states), states.count("pruned"))
    )
    for key, value in best.point.items():
        share = result.importances.get(key)
        rows.add_row(key, str(value), "-" if share is None else f"{share:.0%}")
    console().print(rows)
    out = console()
    out.print(f"best: trial {best.number}, validation loss {best.loss:.4f}", highlight=False)
    out.print(f"report: {study / 'report.html'}", highlight=False)
    if manifest is not None and manifest.metrics is not None:
        primary = manifest.metrics.primary
        figure = manifest.metrics.adapter.get(primary)
        said = f", held-out {primary} {figure:.3f}" if figure is not None else ""
        out.print(f"retrained: {folder}{said}", highlight=False)
    if version is not None:
        out.print(f"pushed: {version.name}@{version.version} {version.digest}", highlight=False)
    elif manifest is None:
        out.print(f"next: lorary train {study / 'best.yaml'}", highlight=False)


def _title(num_trials: int, num_pruned: int) -> str:
    return f"{num_trials} trials, {num_pruned} pruned"
