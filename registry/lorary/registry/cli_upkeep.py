"""Commands that take versions away: deprecate, delete, gc."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Final

import typer

from lorary.errors import InvalidRequest
from lorary.registry import cli_tables
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_complete import complete_selector
from lorary.registry.cli_options import (
    JsonOption,
    NameArgument,
    ReasonOption,
    RefArgument,
    RegistryOption,
    open_registry,
)
from lorary.registry.cli_support import console, print_json, warn
from lorary.registry.refs import check_name, parse_selector

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def deprecate(
    name: NameArgument,
    version: Annotated[
        str,
        typer.Argument(
            metavar="VERSION|ALIAS",
            help="3, @3, or an alias: the version it means now.",
            autocompletion=complete_selector,
        ),
    ],
    off: Annotated[bool, typer.Option("--off", help="Take it back.")] = False,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Say that a version should not be used any more; it still resolves, with a warning."""
    ref = parse_selector(check_name(name), version)
    mark = open_registry(registry).deprecate(ref, is_on=not off, reason=reason)
    if as_json:
        print_json(mark)
    else:
        console().print(cli_tables.history([], [mark]))


def delete(
    ref: RefArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Delete a version that no alias points at; its number is never used again."""
    opened = open_registry(registry)
    info = opened.info(opened.resolve(ref))
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidRequest(
                f"deleting {info.name}@{info.version} cannot be undone; say --yes", field="yes"
            )
        typer.confirm(
            f"Delete {info.name}@{info.version} ({info.digest[:19]}…)? This cannot be undone.",
            abort=True,
            err=True,
        )
    mark = opened.delete(ref, reason=reason)
    if as_json:
        print_json(mark)
    else:
        console().print(cli_tables.history([], [mark]))
        typer.echo("its files stay until `registry gc`", err=True)


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    grace: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="What was written or deleted more recently stays: 90s, 30m, 12h, 7d.",
        ),
    ] = "24h",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Free what no version needs: files of deleted versions, left-overs of interrupted work."""
    opened = open_registry(registry)
    freed = opened.gc(grace_s=_seconds(grace), is_dry=dry_run)
    if as_json:
        print_json({"is_dry": dry_run, "freed": freed})
        return
    console().print(cli_tables.freed(freed, is_dry=dry_run))
    for note in freed.notes:
        warn(note)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None:
        raise InvalidRequest(f"--grace is {text!a}; write 90s, 30m, 12h or 7d", field="grace")
    return float(match[1]) * _UNITS[match[2]]
