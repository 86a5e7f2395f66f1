"""``lorary ps``: what a server is, what is on its device, what is being rolled out.

With ``--watch`` it goes on: on a terminal the table is drawn anew and the last events stand below it;
elsewhere every event is a line.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape

from lorary.cli.call import JsonOption, TargetOption
from lorary.client import AdapterEvent, Client, EventsLost
from lorary.client.channel import DEFAULT_TARGET
from lorary.errors import LoraryError
from lorary.registry.cli_support import console, print_json, table

if TYPE_CHECKING:
    from rich.table import Table

    from lorary.client import AdapterInfo, RolloutInfo, ServerInfo, Snapshot

app = typer.Typer(name="ps", add_completion=False, pretty_exceptions_enable=False)

TIMEOUT_S = 10.0
BAR_WIDTH = 40
REDRAW_S = 1.0
NUM_EVENTS = 8


@app.command(epilog="Example: lorary ps --watch")
def ps(
    show_all: Annotated[
        bool, typer.Option("--all", help="Also what is only in the registry.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until interrupted.")] = False,
    target: TargetOption = DEFAULT_TARGET,
    as_json: JsonOption = False,
) -> None:
    """Show the server's base and load, its adapters and rollouts, and how many share a step."""
    with Client(target, timeout_s=TIMEOUT_S) as client:
        if watch and (as_json or not console().is_terminal):
            _follow(client, as_json=as_json)
        elif watch:
            _live(client, target, show_all=show_all)
        else:
            _once(client, target, show_all=show_all, as_json=as_json)


def _once(client: Client, target: str, *, show_all: bool, as_json: bool) -> None:
    info = client.server_info()
    seen = client.snapshot(resident_only=not show_all)
    if as_json:
        print_json({"server": info, **_fields(seen)})
        return
    screen = console()
    screen.print(*_parts(target, info, seen), sep="\n\n")
    if sum(info.steps_by_distinct_adapters):
        screen.print()
        screen.print(_histogram(info.steps_by_distinct_adapters))


def _follow(client: Client, *, as_json: bool) -> None:
    """Print a line for every event."""
    for message in client.watch():
        if as_json:
            kind = type(message).__name__.lower()
            typer.echo(json.dumps({"type": kind, **_fields(message)}, ensure_ascii=False))
        elif isinstance(message, AdapterEvent):
            typer.echo(_event(message))
        elif isinstance(message, EventsLost):
            typer.echo(f"{message.num_lost} events were lost", err=True)
        else:
            typer.echo(f"{len(message.adapters)} adapters, {len(message.rollouts)} rollouts")


def _live(client: Client, target: str, *, show_all: bool) -> None:
    """Draw everything again and again."""
    events: deque[str] = deque(maxlen=NUM_EVENTS)
    ended: list[LoraryError] = []

    def listen() -> None:
        try:
            for message in client.watch():
                if isinstance(message, AdapterEvent):
                    events.append(_event(message))
        except LoraryError as error:
            ended.append(error)

    threading.Thread(target=listen, name="watch", daemon=True).start()
    with Live(console=console(), auto_refresh=False, screen=True) as live:
        while not ended:
            info = client.server_info()
            seen = client.snapshot(resident_only=not show_all)
            shown: list[Any] = []
            for part in (*_parts(target, info, seen), escape("\n".join(events))):
                shown += [part, ""]
            live.update(Group(*shown), refresh=True)
            time.sleep(REDRAW_S)
    raise ended[0]


def _parts(target: str, info: ServerInfo, seen: Snapshot) -> list[Any]:
    parts: list[Any] = [_server(target, info, seen), _adapters(seen.adapters)]
    if seen.rollouts:
        parts.append(_rollouts(seen.rollouts))
    return parts


def _server(target: str, info: ServerInfo, seen: Snapshot) -> Table:
    rows = table("server", target)
    used, total = info.adapter_memory_used_bytes / 2**20, info.adapter_memory_bytes / 2**20
    rows.add_row("base", f"{info.base} {info.base_fingerprint[:19]}")
    rows.add_row("runs", f"{info.quantization}, {info.dtype}, on {info.device}")
    rows.add_row(
        "limits", f"context {info.max_context}, batch {info.max_batch}, rank {info.max_rank}"
    )
    rows.add_row("adapters", f"{used:.1f} of {total:.0f} MiB")
    rows.add_row("load", f"{info.num_running} running, {info.num_waiting} waiting")
    if seen.registry_trouble:
        rows.add_row("registry", f"[red]away: {escape(seen.registry_trouble)}[/]")
    for ref, reason in seen.behind.items():
        rows.add_row("behind", f"[red]{escape(ref)}: {escape(reason)}[/]")
    rows.add_row("lorary", info.version)
    return rows


def _adapters(adapters: tuple[AdapterInfo, ...]) -> Table | str:
    if not adapters:
        return "no adapters on the device"
    rows = table(
        "adapter",
        "version",
        "aliases",
        "canary",
        "where",
        "rank",
        "pages",
        "MiB",
        "running",
        "served",
        "last used",
        "verified",
        "digest",
    )
    for a in adapters:
        where = f"{a.residency}, pinned" if a.pinned else a.residency
        if a.merged:
            where += f", merged ({_merged(a)})"
        if a.quarantined:
            where = "quarantined"
        size = f"{a.device_bytes / 2**20:.1f}" if a.device_bytes else ""
        rows.add_row(
            a.name,
            str(a.version),
            ", ".join(a.aliases),
            ", ".join(
                f"{alias} {_share(percent, shadow)}" for alias, percent, shadow in a.canaries
            ),
            where,
            str(a.rank or ""),
            str(a.num_pages or ""),
            size,
            str(a.num_running),
            str(a.num_served),
            _ago(a.last_used_s),
            _verified(a),
            a.digest[:19],
        )
    return rows


def _merged(adapter: AdapterInfo) -> str:
    """Return the state of a merged copy, its size, and how many answers run on it."""
    if not adapter.merged_bytes:
        return adapter.merged
    return f"{adapter.merged}, {adapter.merged_bytes / 2**20:.0f} MiB, {adapter.merged_running} running"


def _verified(adapter: AdapterInfo) -> str:
    if not adapter.verified_limit:
        return adapter.verified
    return f"{adapter.verified}, {adapter.verified_divergence:.2g} of {adapter.verified_limit:g}"


def _rollouts(rollouts: tuple[RolloutInfo, ...]) -> Table:
    rows = table("rollout", "versions", "share", "state", "calls", "failed", "p95 ms", "copies")
    for r in rollouts:
        copies = f"{r.num_same} of {r.num_compared} same, divergence {r.divergence:.3f}"
        rows.add_row(
            f"{r.name}@{r.alias}",
            f"{r.holder_version} → {r.canary_version}",
            _share(r.percent, r.shadow),
            f"{r.state}: {escape(r.problem)}" if r.problem else r.state,
            f"{r.holder_calls} → {r.canary_calls}",
            f"{r.holder_errors} → {r.canary_errors}",
            f"{r.holder_p95_s * 1e3:.1f} → {r.canary_p95_s * 1e3:.1f}",
            copies if r.num_compared else "",
        )
    return rows


def _share(percent: float, shadow: float) -> str:
    return f"{percent:g} %" + (f" + {shadow:g} % copies" if shadow else "")


def _ago(when_s: float) -> str:
    """Return how long ago something was: ``12s``, ``5m``, ``3h``, ``2d``; empty for never."""
    if not when_s:
        return ""
    seconds = max(0.0, time.time() - when_s)
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"


def _event(event: AdapterEvent) -> str:
    at = datetime.datetime.fromtimestamp(event.at_s).astimezone().strftime("%H:%M:%S")
    version = f"{event.name}@{event.version}" if event.name else "registry"
    alias = f" ({event.alias})" if event.alias else ""
    detail = f": {event.detail}" if event.detail else ""
    return f"{at} {event.kind.replace('_', ' ')} {version}{alias}{detail}"


def _fields(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)


def _histogram(counts: tuple[int, ...]) -> Table:
    """Return how many steps held k different adapters, as bars."""
    rows = table("adapters in one step", "steps", "")
    most = max(counts)
    for k, count in enumerate(counts):
        rows.add_row(str(k), str(count), "█" * round(BAR_WIDTH * count / most))
    return rows
