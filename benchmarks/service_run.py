"""The order of events of ``service``, and its table."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks import service_parts as measured
from benchmarks.harness.load import process_tree
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.server_process import ServerProcess
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import most_foreign, origin, row
from lorary.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    Load = Callable[[Sequence[Sequence[int]], int], Coroutine[Any, Any, int]]

NAME = "service"
PROMPT_TOKENS = 64
QUIET = 0.1
"""Most cores that others may use on average."""
BAR = 0.9
"""Least share of gRPC's tokens per second that the HTTP door must make."""
BAR_CPU_US, BAR_UNARY_MS, BAR_IDLE_MB = 60.0, 1.0, 100.0
BAR_STREAMS, BAR_IDLE_STREAMS = 256, 1000
"""Of how many streams the bars are."""
PARTS = ("doors", "streams", "unary", "idle")
HERE, ELSEWHERE = "here", "elsewhere"
"""Where a record's model is computed; here, where it does not say."""
APART = "elsewhere, a frame for every token"
"""The same, with ``--stream-frames 0``: what joining steps in a frame saves."""
NOWHERE = "nowhere"
"""An empty service in its place (``harness.empty_service``): what gRPC itself takes of a unary call."""
BESIDE_ENGINE = ("streams", "unary")
"""Parts measured with either; their bars are for a service that has its cores to itself."""
NO_BAR = (
    (
        "streams",
        APART,
        ("service_cpu_us_per_token",),
        "the same µs, a frame for every token (`--stream-frames 0`)",
    ),
    (
        "streams",
        HERE,
        ("service_cpu_us_per_token",),
        "the same µs, the model computed on these cores",
    ),
    ("unary", NOWHERE, ("beside_engine_ms", "p50"), "the same ms of an empty service of gRPC's"),
    ("unary", HERE, ("beside_engine_ms", "p50"), "the same ms, the model computed on these cores"),
)
STEPS_MS = {"streams": "33", "unary": "0"}
"""Of the server whose model is elsewhere: 30 tokens a second for each stream, and calls answered at once, so that
the cores of whoever waits do not fall asleep: waking them is most of what a call after 12 idle ms takes."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each kind.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once of a door.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 64,
    many: Annotated[int, typer.Option(min=1, help="Streams at once of 'streams'.")] = BAR_STREAMS,
    idle: Annotated[int, typer.Option(min=1, help="Streams of 'idle'.")] = BAR_IDLE_STREAMS,
    calls: Annotated[int, typer.Option(min=100, help="Calls of a round of 'unary'.")] = 200,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure this part; of {', '.join(PARTS)}.")
    ] = None,
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    engine_process: Annotated[
        bool, typer.Option("--engine-process", help="Measure a server with this switch.")
    ] = False,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure what the service costs beside its engine, and compare its two doors."""
    if table:
        options.show(NAME, out, section)
        return
    parts = tuple(only or PARTS)
    options.known(parts, PARTS)
    beside = [part for part in BESIDE_ENGINE if part in parts]
    used = threads or len(os.sched_getaffinity(0))
    setup = {"base": base, "threads": used, "streams": streams, "tokens": tokens}
    setup |= {"many": many, "idle": idle, "calls": calls}
    setup |= {"engine_process": engine_process}
    path = out or result_path(NAME)
    quiet = Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load)
    kept = Kept(path, head(NAME, setup), quiet)
    prompts = _prompts(base, max(streams, many))
    with tempfile.TemporaryDirectory(prefix="lorary-service-") as scratch:
        registry = Path(scratch) / "registry"
        Registry.open(registry, create=True)
        arguments = ["--base", base, "--registry", str(registry), "--device", "cpu"]
        arguments += ["--threads", str(used), "--http-port", "0", "--max-batch", str(many)]
        arguments += ["--engine-process"] if engine_process else []
        with ServerProcess(arguments, Path(scratch)) as server:
            address, pid = server.address, int(server.facts["pid"])
            if "doors" in parts:
                _measure_doors(kept, server, prompts[:streams], tokens, rounds)
            works = [_beside_engine(part, server, prompts, setup, HERE) for part in beside]
            for _ in range(rounds):
                for work in works:
                    kept.measure(work)
            if "idle" in parts:
                kept.measure(lambda: measured.idle(address, pid, idle))
        distant = [(part, ELSEWHERE, arguments) for part in beside]
        if "streams" in parts:
            distant.append(("streams", APART, [*arguments, "--stream-frames", "0"]))
        for part, model, options_of in distant:
            with ExitStack() as stack:
                servers = {model: stack.enter_context(_distant(part, options_of, Path(scratch)))}
                if part == "unary":
                    servers[NOWHERE] = stack.enter_context(_empty(Path(scratch) / NOWHERE))
                works = [
                    _beside_engine(part, server, prompts, setup, where)
                    for where, server in servers.items()
                ]
                for _ in range(rounds):
                    for work in works:
                        kept.measure(work)
    kept.finish(console, table_of)


def _distant(part: str, arguments: Sequence[str], scratch: Path) -> ServerProcess:
    """Start a server that does not compute its model on these cores, at the pace of a part."""
    environment = {**os.environ, "STEP_MS": STEPS_MS[part], "PYTHONPATH": os.pathsep.join(sys.path)}
    return ServerProcess(
        arguments, scratch, environment=environment, module="benchmarks.harness.distant_server"
    )


def _empty(scratch: Path) -> ServerProcess:
    """Start a server of gRPC's that does nothing else."""
    return ServerProcess([], scratch, module="benchmarks.harness.empty_service")


def _beside_engine(
    part: str,
    server: ServerProcess,
    prompts: Sequence[Sequence[int]],
    setup: dict[str, Any],
    model: str,
) -> Callable[[], dict[str, Any]]:
    """Return what measures a round of a part of ``BESIDE_ENGINE``."""

    def work() -> dict[str, Any]:
        if part == "unary":
            found = measured.unary(server.address, prompts, setup["calls"])
        else:
            found = measured.streams(
                server.address,
                int(server.facts["pid"]),
                prompts[: setup["many"]],
                setup["tokens"],
                int(server.facts["engine_pid"]),
            )
        return {**found, "model": model}

    return work


def _measure_doors(
    kept: Kept,
    server: ServerProcess,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    rounds: int,
) -> None:
    doors = _doors(server)
    for load in doors.values():
        asyncio.run(load(prompts, tokens))
    for turn in range(rounds):
        # Who is first has the caches of nobody.
        for name in list(doors)[:: 1 if turn % 2 else -1]:
            kept.measure(functools.partial(_round, name, doors[name], server, prompts, tokens))


def _prompts(name: str, count: int) -> list[tuple[int, ...]]:
    from benchmarks.setup import TEXT
    from benchmarks.workload import Prompts
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer

    tokenizer = load_tokenizer(find_base(name))
    return Prompts(tokenizer, TEXT).take(count, PROMPT_TOKENS, random.Random(0))


def _round(
    name: str,
    load: Load,
    server: ServerProcess,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> dict[str, Any]:
    """Measure one round of one door."""
    pid = int(server.facts["pid"])
    ticks, started = process_tree(pid)[pid], time.monotonic()
    count = asyncio.run(load(prompts, tokens))
    seconds = time.monotonic() - started
    cpu_s = (process_tree(pid)[pid] - ticks) / os.sysconf("SC_CLK_TCK")
    return {
        "kind": "round",
        "door": name,
        "tokens_per_s": round(count / seconds, 1),
        "server_cpu_us_per_token": round(1e6 * cpu_s / count),
    }


def _doors(server: ServerProcess) -> dict[str, Load]:
    async def by_http(prompts: Sequence[Sequence[int]], tokens: int) -> int:
        """Stream every prompt's answer through a connection each; return how many tokens came."""
        url = str(server.facts["http"])
        return sum(
            await asyncio.gather(*(measured.stream_http(url, ids, tokens) for ids in prompts))
        )

    return {"gRPC": functools.partial(measured.stream_all, server.address), "HTTP": by_http}


def medians(records: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return each door's tokens per second and microseconds of server CPU for one, of accepted rounds."""
    rounds = [r for r in records if r["kind"] == "round" and r["accepted"]]
    return {
        door: (
            statistics.median(r["tokens_per_s"] for r in rounds if r["door"] == door),
            statistics.median(r["server_cpu_us_per_token"] for r in rounds if r["door"] == door),
        )
        for door in dict.fromkeys(r["door"] for r in rounds)
    }


def figures(records: Sequence[dict[str, Any]]) -> list[tuple[str, float | None, str, bool]]:
    """Return every figure that has a bar: name, value (None: not measured), bar, whether it is reached."""
    doors = medians(records)
    share = doors["HTTP"][0] / doors["gRPC"][0] if {"HTTP", "gRPC"} <= set(doors) else None
    found: list[tuple[str, float | None, str, bool]] = [
        (
            "tokens/s through HTTP, share of those through gRPC",
            share,
            f"at least {BAR:g}",
            share is not None and share >= BAR,
        )
    ]
    bars = (
        (
            "streams",
            ELSEWHERE,
            ("service_cpu_us_per_token",),
            "µs of service CPU a streamed token",
            BAR_CPU_US,
        ),
        (
            "unary",
            ELSEWHERE,
            ("beside_engine_ms", "p50"),
            "ms of a unary call beside the engine",
            BAR_UNARY_MS,
        ),
        ("idle", HERE, ("added_mb",), "MB that idle streams add", BAR_IDLE_MB),
    )
    for kind, model, path, name, most in bars:
        value = _median(records, kind, path, model)
        found.append((name, value, f"at most {most:g}", value is not None and value <= most))
    return found


def _median(
    records: Sequence[dict[str, Any]], kind: str, path: Sequence[str], model: str
) -> float | None:
    """Return the median of a number of the accepted records of a kind, the model computed at a place."""
    values = [
        _value(r, path)
        for r in records
        if r["kind"] == kind and r["accepted"] and r.get("model", HERE) == model
    ]
    return statistics.median(values) if values else None


def _value(record: Any, path: Sequence[str]) -> float:
    for key in path:
        record = record[key]
    return float(record)


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the doors and every figure as Markdown."""
    lines = [
        row(["door", "output tokens/s", "server CPU, µs a token"]),
        row(["---", "---:", "---:"]),
        *(
            row([door, f"{speed:.0f}", f"{cpu:.0f}"])
            for door, (speed, cpu) in sorted(medians(records).items())
        ),
        "",
        row(["figure", "measured", "bar", ""]),
        row(["---", "---:", "---", "---"]),
    ]
    for name, value, bar, is_ok in figures(records):
        shown = "not measured on a quiet machine" if value is None else f"{value:.3g}"
        lines.append(row([name, shown, bar, "ok" if is_ok else "short"]))
    for kind, model, path, name in NO_BAR:
        value = _median(records, kind, path, model)
        if value is not None:
            lines.append(row([name, f"{value:.3g}", "", ""]))
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup = records[0]["setup"]
    return "\n".join(
        [
            f"{origin(records[0])}; doors: {setup['streams']} streams of {setup['tokens']} tokens on the bare "
            f"base; {setup['many']} streams; {setup['idle']} idle ones; "
            f"medians of rounds, others used at most {most_foreign(records):.2f} cores. "
            f"Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
