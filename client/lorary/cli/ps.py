"""``lorary ps``: what a server is, what is on its device, and how mixed its steps are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli.call import JsonOption, TargetOption
from lorary.client import Client
from lorary.client.channel import DEFAULT_TARGET
from lorary.registry.cli_support import console, print_json, table

if TYPE_CHECKING:
    from rich.table import Table

    from lorary.client import AdapterInfo, ServerInfo

app = typer.Typer(name="ps", add_completion=False, pretty_exceptions_enable=False)

TIMEOUT_S = 10.0
BAR_WIDTH = 40


@app.command(epilog="Example: lorary ps --all")
def ps(
    show_all: Annotated[
        bool, typer.Option("--all", help="Also what is only in the registry.")
    ] = False,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Show the server's base and load, its adapters, and how many adapters share a step."""
    with Client(target, timeout_s=TIMEOUT_S) as client:
        info = client.server_info()
        adapters = client.list_adapters(resident_only=not show_all)
    if as_json:
        print_json({"server": info, "adapters": adapters})
        return
    screen = console()
    screen.print(_server(target, info), _adapters(adapters), sep="\n\n")
    if sum(info.steps_by_distinct_adapters):
        screen.print()
        screen.print(_histogram(info.steps_by_distinct_adapters))


def _server(target: str, info: ServerInfo) -> Table:
    rows = table("server", target)
    used, total = info.adapter_memory_used_bytes / 2**20, info.adapter_memory_bytes / 2**20
    rows.add_row("base", f"{info.base} {info.base_fingerprint[:19]}")
    rows.add_row("runs", f"{info.quantization}, {info.dtype}, on {info.device}")
    rows.add_row(
        "limits", f"context {info.max_context}, batch {info.max_batch}, rank {info.max_rank}"
    )
    rows.add_row("adapters", f"{used:.1f} of {total:.0f} MiB")
    rows.add_row("load", f"{info.num_running} running, {info.num_waiting} waiting")
    rows.add_row("lorary", info.version)
    return rows


def _adapters(adapters: list[AdapterInfo]) -> Table | str:
    if not adapters:
        return "no adapters on the device"
    rows = table(
        "adapter", "version", "aliases", "where", "rank", "MiB", "running", "verified", "digest"
    )
    for a in adapters:
        where = f"{a.residency}, pinned" if a.pinned else a.residency
        if a.quarantined:
            where = "quarantined"
        size = f"{a.device_bytes / 2**20:.1f}" if a.device_bytes else ""
        rows.add_row(
            a.name,
            str(a.version),
            ", ".join(a.aliases),
            where,
            str(a.rank or ""),
            size,
            str(a.num_running),
            _verified(a),
            a.digest[:19],
        )
    return rows


def _verified(adapter: AdapterInfo) -> str:
    if not adapter.verified_limit:
        return adapter.verified
    return f"{adapter.verified}, {adapter.verified_divergence:.2g} of {adapter.verified_limit:g}"


def _histogram(counts: tuple[int, ...]) -> Table:
    """Return how many steps held k different adapters, as bars."""
    rows = table("adapters in one step", "steps", "")
    most = max(counts)
    for k, count in enumerate(counts):
        rows.add_row(str(k), str(count), "█" * round(BAR_WIDTH * count / most))
    return rows
