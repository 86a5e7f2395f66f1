"""Commands between registries and hubs: import, mirror, login."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lorary.errors import InvalidRequest
from lorary.registry import cli_tables
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_options import (
    AllowZeroOption,
    JsonOption,
    NameArgument,
    RegistryOption,
    open_registry,
)
from lorary.registry.cli_support import console, print_json, progress_bar
from lorary.registry.refs import check_name


def import_adapter(
    source: Annotated[
        str, typer.Argument(metavar="OWNER/REPO[@REVISION]", help="A PEFT repository on the Hub.")
    ],
    name: NameArgument,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or name of its base; needed unless a registry made it."),
    ] = None,
    description: Annotated[str, typer.Option(help="A line for people.")] = "",
    allow_zero: AllowZeroOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Take an adapter from a PEFT repository on a Hub, through all checks of a push."""
    from lorary.registry import hub_import
    from lorary.registry.cli_versions import find_card

    check_name(name)
    found = hub_import.find(source)
    with tempfile.TemporaryDirectory(prefix="lorary-import-") as temporary:
        folder = Path(temporary)
        with progress_bar(f"fetching {found.repo_id}", None) as progress:
            manifest = hub_import.download(found, folder, progress)
        card = find_card(manifest, base)
        opened = open_registry(registry, create=True)
        with progress_bar("pushing", None) as progress:
            info = hub_import.push_imported(
                opened,
                found,
                folder,
                name,
                base=card,
                description=description,
                allow_zero=allow_zero,
                progress=progress,
            )
    if as_json:
        print_json({"version": info, "commit": found.commit, "left_out": found.left_out})
    else:
        console().print(cli_tables.versions([info]))
        if found.left_out:
            typer.echo(f"left out: {', '.join(found.left_out)}", err=True)


def mirror(
    source: Annotated[str, typer.Argument(metavar="SRC", help="file:///path, a path, hf://owner.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The same; a folder is made.")],
    names: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Only this adapter; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy adapters with versions, aliases and logs to another registry; again, and only what is new."""
    from lorary.registry.mirror import mirror as copy

    origin, mirrored = open_registry(source), open_registry(target, create=True)
    with progress_bar("mirroring", None) as progress:
        done = copy(origin, mirrored, names or (), progress=progress)
    if as_json:
        print_json(done)
    else:
        console().print(cli_tables.mirrored(done))
        for one in done:
            if one.num_unsigned:
                console().print(
                    f"{one.num_unsigned} signed versions of {one.name} have another manifest in {target}, "
                    f"which their signatures do not cover: registry sign {one.name}@VERSION there",
                    highlight=False,
                )


def login(as_json: JsonOption = False) -> None:
    """Check a token of the Hub and keep it, for this and every other program that uses the Hub."""
    from lorary.registry.hub_client import log_in

    if sys.stdin.isatty():
        token = typer.prompt("Token", hide_input=True, err=True)
    else:
        token = sys.stdin.readline()
    if not token.strip():
        raise InvalidRequest("no token was given; type it, or pipe it in: registry login < token")
    endpoint, user = log_in(token.strip())
    if as_json:
        print_json({"endpoint": endpoint, "user": user})
    else:
        typer.echo(f"logged in to {endpoint} as {user}")
