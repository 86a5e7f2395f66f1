"""``lorary assets``: fetch and list the packages that carry models and data."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lorary.bases.assets import CATALOGUE, fetch_assets

app = typer.Typer(
    name="assets",
    help="Packages that carry base models and data, kept apart from the environment.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which ones; by default, what demo and recipes need.")
    ] = None,
) -> None:
    """Fetch asset packages that are not there yet; pinned versions, hashes checked."""
    console = Console(stderr=True)
    fetch_assets(names or None, progress=lambda line: console.print(line, highlight=False))


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """List the catalogue, and where what is fetched lies."""
    packages = sorted(CATALOGUE.values(), key=lambda package: package.name)
    if as_json:
        rows = [
            {
                "name": package.name,
                "version": package.version,
                "carries": package.carries,
                "licence": package.licence,
                "folder": str(package.folder) if package.folder.is_dir() else None,
            }
            for package in packages
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("package", "version", "carries", "licence", "fetched")
    for package in packages:
        fetched = str(package.folder) if package.folder.is_dir() else "no"
        table.add_row(package.name, package.version, package.carries, package.licence, fetched)
    Console().print(table)
