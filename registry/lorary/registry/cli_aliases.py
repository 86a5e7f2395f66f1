"""Commands about aliases: alias, promote, rollback, protect, whowas, log."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorary.errors import InvalidRequest
from lorary.registry import cli_tables
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.aliases import UNSET, AliasMove, Unset
from lorary.registry.cli_complete import complete_alias, complete_selector
from lorary.registry.cli_options import (
    AliasArgument,
    ExpectOption,
    ForceOption,
    JsonOption,
    NameArgument,
    ReasonOption,
    RefArgument,
    RegistryOption,
    RequireOption,
    open_registry,
)
from lorary.registry.cli_support import console, print_json, warn
from lorary.registry.refs import check_name, parse_ref, parse_selector


def log(
    name: NameArgument,
    alias: Annotated[
        str | None, typer.Option(help="Only this alias.", autocompletion=complete_alias)
    ] = None,
    with_marks: Annotated[
        bool, typer.Option("--all", help="Deprecations, deletions and protections as well.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show who moved which alias, when and why."""
    opened = open_registry(registry)
    moves = opened.log(name, alias)
    if not with_marks:
        if as_json:
            print_json(moves)
        else:
            console().print(cli_tables.moves(moves))
        return
    marks = [m for m in opened.marks(name).entries if alias in (None, m.alias)]
    if as_json:
        print_json({"moves": moves, "marks": marks})
    else:
        console().print(cli_tables.history(moves, marks))


def alias(
    name: NameArgument,
    alias: Annotated[
        str | None,
        typer.Argument(
            help="The alias; without it, all are listed.", autocompletion=complete_alias
        ),
    ] = None,
    version: Annotated[
        str | None,
        typer.Argument(help="3, @3, @canary or @sha256:ab12….", autocompletion=complete_selector),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    expect: ExpectOption = None,
    require: RequireOption = None,
    force: ForceOption = False,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version, remove it, or list all."""
    opened = open_registry(registry)
    if alias is None:
        found: dict[str, Any] = {**opened.aliases(name)}
        for split in opened.rollouts.all(name).values():
            found[split.alias] = {"version": split.version, "canary": split.canary.to_dict()}
        if as_json:
            print_json(found)
        else:
            console().print(cli_tables.aliases(found, opened.marks(name)))
        return
    if (version is None) != remove:
        raise InvalidRequest("name either a version (registry alias NAME prod 3) or --remove")
    target = None
    if version is not None:
        target = opened.resolve(parse_selector(check_name(name), version)).version
    move = opened.set_alias(
        name,
        alias,
        target,
        expect=expected(expect),
        reason=reason,
        require=require or (),
        force=force,
    )
    _print_move(move, as_json=as_json)


def promote(
    ref: RefArgument,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="ALIAS|VERSION",
            help="The alias to move to that version; with --to, the version of REF.",
            autocompletion=complete_selector,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="ALIAS", help="The alias.", autocompletion=complete_alias),
    ] = None,
    expect: ExpectOption = None,
    require: RequireOption = None,
    force: ForceOption = False,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version whose figures meet what is required."""
    if to is None and second is None:
        raise InvalidRequest("name the alias: registry promote NAME VERSION --to ALIAS")
    if to is not None and second is not None:
        target = parse_selector(check_name(ref), second)
    else:
        target = parse_ref(ref)
    opened = open_registry(registry)
    resolved = opened.resolve(target)
    if resolved.deprecated:
        warn(f"{resolved.name}@{resolved.version} was deprecated {resolved.deprecated}")
    if force and not reason.strip():
        raise InvalidRequest("--force needs a --reason: it is kept in the log", field="reason")
    move = opened.set_alias(
        resolved.name,
        to or second or "",
        resolved.version,
        expect=expected(expect),
        reason=reason or f"promoted {target}",
        require=require or (),
        force=force,
    )
    _print_move(move, as_json=as_json)


def rollback(
    name: NameArgument,
    alias: AliasArgument,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Return an alias to where it pointed before; again, and it goes further back."""
    move = open_registry(registry).rollback(name, alias, reason=reason)
    _print_move(move, as_json=as_json)


def protect(
    name: NameArgument,
    alias: AliasArgument,
    require: RequireOption = None,
    off: Annotated[bool, typer.Option("--off", help="Take the protection back.")] = False,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Let an alias move only to what meets its requirements, or by --force with a --reason."""
    if off and require:
        raise InvalidRequest("--off takes the whole protection back; leave --require out")
    opened = open_registry(registry)
    mark = opened.protect(name, alias, require=require or (), is_on=not off, reason=reason)
    if as_json:
        print_json(mark)
    else:
        console().print(cli_tables.history([], [mark]))


def whowas(
    name: NameArgument,
    alias: AliasArgument,
    at: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="2026-11-01 or 2026-11-01T12:00[+01:00]; UTC if no zone is named."
        ),
    ],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Say which version an alias pointed at, at a time in the past."""
    # Imported here, as in all commands: what reads tensors takes long to import.
    from lorary.registry.whowas import whowas as look

    held = look(open_registry(registry), name, alias, at)
    if as_json:
        print_json(held)
    else:
        console().print(cli_tables.held(held))


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


def _print_move(move: AliasMove, *, as_json: bool) -> None:
    if as_json:
        print_json(move)
    else:
        console().print(cli_tables.moves([move]))
