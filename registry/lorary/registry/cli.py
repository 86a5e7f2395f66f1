"""The ``registry`` command: its table of contents. Every ``cli_*`` module holds one heading's commands."""

from __future__ import annotations

from typing import Final

import typer

from lorary.registry.cli_lazy import Entry, lazy_group
from lorary.registry.cli_support import run

VERSIONS: Final = "Versions"
ALIASES: Final = "Aliases"
UPKEEP: Final = "Upkeep"
HUBS: Final = "Hubs"

COMMANDS: Final[dict[str, Entry]] = {
    "push": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:push",
        "Validate an adapter and keep it as a version; equal content is the version it was.",
        "push runs/sentiment sentiment --alias prod",
    ),
    "pull": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:pull",
        "Copy a version to a standard PEFT folder, every byte verified.",
        "pull sentiment@prod ./sentiment",
    ),
    "list": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:list_versions",
        "List versions with their aliases and metrics.",
        "list --json",
    ),
    "show": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:show",
        "Show everything a version says about itself.",
        "show sentiment@prod",
    ),
    "alias": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:alias",
        "Point an alias at a version, remove it, or list all.",
        "alias sentiment prod @3 --expect 2 --reason 'better F1'",
    ),
    "promote": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:promote",
        "Point an alias at the version that a ref means now.",
        "promote sentiment@canary prod",
    ),
    "rollback": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:rollback",
        "Return an alias to where it pointed before; again, and it goes further back.",
        "rollback sentiment prod --reason 'errors up'",
    ),
    "log": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:log",
        "Show who moved which alias, when and why.",
        "log sentiment --alias prod",
    ),
    "verify": Entry(
        UPKEEP,
        "lorary.registry.cli_versions:verify",
        "Read every byte and compare it with what was promised; exit code 5 if anything differs.",
        "verify",
    ),
    "serve": Entry(
        HUBS,
        "lorary.registry.cli_serve:serve",
        "Serve a Hub of one's own: what speaks to the Hugging Face Hub works by HF_ENDPOINT alone.",
        "serve /srv/hub --port 8080 --tokens tokens.txt",
    ),
}

app = typer.Typer(
    name="registry",
    cls=lazy_group(COMMANDS, prog_name="registry"),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def registry() -> None:
    """Keep adapters as immutable, numbered, verified versions, with movable aliases.

    A ref is [bold]name[/] (the newest version), [bold]name@prod[/] (an alias), [bold]name@3[/] (a
    version) or [bold]name@sha256:ab12…[/] (a digest).
    """


def main() -> None:
    """Run the ``registry`` console script."""
    run(app, prog_name="registry")
