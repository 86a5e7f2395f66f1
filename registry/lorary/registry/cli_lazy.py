"""Commands that are imported when they are used, so that ``--help`` needs none of what they need.

A table says of every command where it is, under which heading help shows it, what it does in a line,
and an example; its function is an ordinary typer function.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
import typer.core
import typer.main


@dataclass(frozen=True, slots=True)
class Entry:
    """One command.

    Attributes:
        heading: under which help lists it.
        function: ``module:function``.
        help: what it does, in a line; the first line of the function's docstring.
        example: a call, without the program's name.
    """

    heading: str
    function: str
    help: str
    example: str


def lazy_group(entries: Mapping[str, Entry], *, prog_name: str) -> type[typer.core.TyperGroup]:
    """Return the class of a group whose commands are ``entries``."""

    class LazyGroup(typer.core.TyperGroup):
        """Commands by name, loaded when they are used."""

        def list_commands(self, ctx: Any) -> list[str]:
            """Return the names in the order of the table."""
            return list(entries)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            """Return a stand-in; ``None`` for an unknown name."""
            entry = entries.get(cmd_name)
            return None if entry is None else _Lazy(cmd_name, entry, prog_name)

    return LazyGroup


class _Lazy(typer.core.TyperCommand):
    """Stands for a command in help and completion; becomes the real one when it is used."""

    def __init__(self, name: str, entry: Entry, prog_name: str) -> None:
        super().__init__(name, help=entry.help, rich_help_panel=entry.heading)
        self._entry = entry
        self._prog_name = prog_name

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Load the real command and let it read its arguments."""
        module, _, function = self._entry.function.partition(":")
        app = typer.Typer(rich_markup_mode="rich", add_completion=False)
        epilog = f"Example: {self._prog_name} {self._entry.example}"
        app.command(self.name, epilog=epilog)(getattr(importlib.import_module(module), function))
        real = typer.main.get_command(app)
        return real.make_context(info_name, args, parent=parent, **extra)
