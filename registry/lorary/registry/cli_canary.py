"""The command that shares an alias's calls with a second version."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorary.errors import InvalidRequest
from lorary.registry import cli_tables
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_options import JsonOption, ReasonOption, RegistryOption, open_registry
from lorary.registry.cli_support import console, print_json
from lorary.registry.refs import check_alias, check_name, parse_selector
from lorary.registry.splits import LIMITS, Canary, Gates


def canary(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name.")],
    alias: Annotated[str, typer.Argument(help="The alias whose calls are shared.")],
    version: Annotated[
        str | None, typer.Argument(help="The candidate: 8, @8 or @sha256:ab12….")
    ] = None,
    percent: Annotated[
        float | None, typer.Option(min=0, max=100, help="Percent of calls it answers; 10.")
    ] = None,
    shadow: Annotated[
        float, typer.Option(min=0, max=100, help="Percent of the others it gets a copy of.")
    ] = 0.0,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            help="errors=0.02, divergence=0.2, latency=1.5; calls=50 before any is judged. Repeated.",
        ),
    ] = None,
    auto_promote: Annotated[
        int, typer.Option(min=0, help="Move the alias to it after so many calls within its gates.")
    ] = 0,
    stop: Annotated[bool, typer.Option("--stop", help="End the canary; the alias stays.")] = False,
    promote: Annotated[
        bool, typer.Option("--promote", help="Move the alias to its canary.")
    ] = False,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Let a second version answer a share of an alias's calls; end that, or promote it."""
    if (version is not None) + stop + promote != 1:
        raise InvalidRequest(
            "name a version (registry canary NAME prod 8 --percent 10), or --stop, or --promote"
        )
    check_alias(alias)
    opened = open_registry(registry)
    rollouts = opened.rollouts
    if stop:
        move = rollouts.stop(name, alias, reason=reason)
    elif promote:
        move = rollouts.promote(name, alias, reason=reason)
    else:
        target = opened.resolve(parse_selector(check_name(name), str(version))).version
        # A shadow alone answers nobody; without either, a tenth of the calls.
        share = percent if percent is not None else (0.0 if shadow else 10.0)
        candidate = Canary(
            version=target,
            percent=share,
            shadow=shadow,
            gates=parse_gates(gate or []),
            promote_after=auto_promote,
        )
        move = rollouts.start(name, alias, candidate, reason=reason)
    if as_json:
        print_json(move)
    else:
        console().print(cli_tables.moves([move]))


def parse_gates(texts: list[str]) -> Gates:
    """Return the gates that ``errors=0.02``, ``calls=100`` … say.

    Raises:
        InvalidRequest: an unknown gate, one given twice, or a value that is no number of its range.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in ("calls", *LIMITS) or name in found:
            raise InvalidRequest(
                f"gate {text!r} is unknown or given twice; gates are calls, {', '.join(LIMITS)}: "
                "--gate errors=0.02"
            )
        try:
            found[name] = int(value) if name == "calls" else float(value)
        except ValueError as error:
            raise InvalidRequest(f"gate {text!r} has no number; write --gate {name}=0.1") from error
    return Gates(**found)
