"""Commands about aliases: log, alias, promote, rollback."""

from __future__ import annotations

from typing import Annotated

import typer

from lorary.errors import InvalidRequest
from lorary.registry import cli_tables
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.aliases import UNSET, AliasMove, Unset
from lorary.registry.cli_options import (
    JsonOption,
    NameArgument,
    ReasonOption,
    RefArgument,
    RegistryOption,
    open_registry,
)
from lorary.registry.cli_support import console, print_json
from lorary.registry.refs import check_name, parse_selector


def log(
    name: NameArgument,
    alias: Annotated[str | None, typer.Option(help="Only this alias.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show who moved which alias, when and why."""
    moves = open_registry(registry).log(name, alias)
    if as_json:
        print_json(moves)
    else:
        console().print(cli_tables.moves(moves))


def alias(
    name: NameArgument,
    alias: Annotated[
        str | None, typer.Argument(help="The alias; without it, all are listed.")
    ] = None,
    version: Annotated[str | None, typer.Argument(help="3, @3, @canary or @sha256:ab12….")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    expect: Annotated[
        str | None,
        typer.Option(help="Change nothing unless the alias is at this version, or at 'none'."),
    ] = None,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version, remove it, or list all."""
    opened = open_registry(registry)
    if alias is None:
        _print_aliases(opened.aliases(name), as_json=as_json)
        return
    if (version is None) != remove:
        raise InvalidRequest("name either a version (registry alias NAME prod 3) or --remove")
    target = None
    if version is not None:
        target = opened.resolve(parse_selector(check_name(name), version)).version
    move = opened.set_alias(name, alias, target, expect=expected(expect), reason=reason)
    _print_move(move, as_json=as_json)


def promote(
    ref: RefArgument,
    alias: Annotated[str, typer.Argument(help="The alias to move to that version.")],
    expect: Annotated[
        str | None,
        typer.Option(help="Change nothing unless the alias is at this version, or at 'none'."),
    ] = None,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at the version that a ref means now."""
    opened = open_registry(registry)
    resolved = opened.resolve(ref)
    move = opened.set_alias(
        resolved.name,
        alias,
        resolved.version,
        expect=expected(expect),
        reason=reason or f"promoted {ref}",
    )
    _print_move(move, as_json=as_json)


def rollback(
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="The alias to move back.")],
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Return an alias to where it pointed before; again, and it goes further back."""
    move = open_registry(registry).rollback(name, alias, reason=reason)
    _print_move(move, as_json=as_json)


def expected(text: str | None) -> int | Unset | None:
    """Read what ``--expect`` says."""
    if text is None:
        return UNSET
    if text == "none":
        return None
    version = parse_selector("any", text).version
    if version is None:
        raise InvalidRequest(f"--expect is '{text}'; it must be a version's number, or 'none'")
    return version


def _print_aliases(found: dict[str, int], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        console().print(cli_tables.aliases(found))


def _print_move(move: AliasMove, *, as_json: bool) -> None:
    if as_json:
        print_json(move)
    else:
        console().print(cli_tables.moves([move]))
