"""``lorary load``, ``prefetch``, ``unload``, ``pin``, ``unpin``: what is on a server's device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli.call import JsonOption, TargetOption
from lorary.client import Client
from lorary.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from lorary.registry.cli_support import print_json

if TYPE_CHECKING:
    from lorary.client import AdapterInfo

AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="name, name@prod, name@3 …")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds.")]


def _app(name: str) -> typer.Typer:
    return typer.Typer(name=name, add_completion=False, pretty_exceptions_enable=False)


load_app, prefetch_app, unload_app = _app("load"), _app("prefetch"), _app("unload")
pin_app, unpin_app = _app("pin"), _app("unpin")


@load_app.command(epilog="Example: lorary load sentiment@prod --pin")
def load(
    adapter: AdapterArgument,
    pin: Annotated[bool, typer.Option("--pin", help="Never evict it.")] = False,
    target: TargetOption = DEFAULT_TARGET,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Load a version and return when it is on the device."""
    with Client(target, timeout_s=timeout) as client:
        _print(client.load_adapter(adapter, pin=pin), as_json=as_json)


@prefetch_app.command(epilog="Example: lorary prefetch sentiment@prod")
def prefetch(
    adapter: AdapterArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is there.")] = False,
    target: TargetOption = DEFAULT_TARGET,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Begin to load a version and return at once."""
    with Client(target, timeout_s=timeout) as client:
        _print(client.prefetch_adapter(adapter, wait=wait), as_json=as_json)


@unload_app.command(epilog="Example: lorary unload sentiment@1 --force")
def unload(
    adapter: AdapterArgument,
    force: Annotated[
        bool, typer.Option("--force", help="End the calls that use it, and do not wait for them.")
    ] = False,
    target: TargetOption = DEFAULT_TARGET,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Free a version's memory once the calls that use it have ended."""
    with Client(target, timeout_s=timeout) as client:
        _print(client.unload_adapter(adapter, force=force), as_json=as_json)


@pin_app.command(epilog="Example: lorary pin sentiment@3")
def pin(
    adapter: AdapterArgument,
    target: TargetOption = DEFAULT_TARGET,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Keep a version that is on the device there."""
    with Client(target, timeout_s=timeout) as client:
        _print(client.pin_adapter(adapter), as_json=as_json)


@unpin_app.command(epilog="Example: lorary unpin sentiment@3")
def unpin(
    adapter: AdapterArgument,
    target: TargetOption = DEFAULT_TARGET,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Let a version be evicted again."""
    with Client(target, timeout_s=timeout) as client:
        _print(client.unpin_adapter(adapter), as_json=as_json)


def _print(adapter: AdapterInfo, *, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
        return
    pinned = ", pinned" if adapter.pinned else ""
    running = f", {adapter.num_running} running" if adapter.num_running else ""
    typer.echo(
        f"{adapter.name}@{adapter.version} {adapter.digest[:19]}: {adapter.residency}{pinned}{running}"
    )
