"""The order of events of ``soak``, its table and its picture."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import DOCUMENT, head, result_path
from benchmarks.harness.server_process import ServerProcess
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import origin, row
from benchmarks.plot import panels
from benchmarks.setup import TEXT
from benchmarks.soak_traffic import Library, Pace, line, lows, slopes, soak
from benchmarks.workload import Prompts
from lorary.bases import find_base
from lorary.bases.load import load_tokenizer
from lorary.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "soak"
GROWTH = {"memory_mb": 50.0, "threads": 1.0, "files": 1.0, "tasks": 1.0}
"""Most that each may grow by in an hour."""
NAMED = {
    "memory_mb": "resident memory, MB",
    "threads": "threads",
    "files": "open files",
    "tasks": "tasks of the event loop",
}
MINUTES = 30.0
"""Of a soak whose lines count."""
ADAPTERS, RANK, CALLERS, PROMPTS, PROMPT_TOKENS = 48, 16, 8, 256, 64
ADAPTER_MEMORY, HOST_MEMORY = "120MB", "120MB"
"""A dozen adapters fit into each, so that both are full within a minute and stay so."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    minutes: Annotated[float, typer.Option(min=0.2, help="How long.")] = MINUTES,
    base: options.Base = options.BASE,
    engine_process: Annotated[
        bool, typer.Option("--engine-process", help="Soak a server with this switch.")
    ] = False,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Soak a server, and say what grew."""
    if table:
        path = options.show(NAME, out, section)
        draw(report.read(path)[-1]["series"], DOCUMENT.with_name(f"{NAME}.svg"))
        return
    setup = {"base": base, "threads": 1, "minutes": minutes, "adapters": ADAPTERS, "rank": RANK}
    setup |= {"callers": CALLERS, "engine_process": engine_process}
    path = out or result_path(NAME)
    kept = Kept(path, head(NAME, setup), Quiet(max_foreign=math.inf, retries=0))
    found = find_base(base)
    prompts = Prompts(load_tokenizer(found), TEXT).take(PROMPTS, PROMPT_TOKENS, random.Random(0))
    with tempfile.TemporaryDirectory(prefix="lorary-soak-") as scratch:
        registry = Registry.open(Path(scratch) / "registry", create=True)
        names = [f"soak-{k:02d}" for k in range(ADAPTERS)]
        library = Library(registry, found, names, RANK, Path(scratch) / "one")
        library.fill()
        arguments = ["--base", base, "--registry", str(Path(scratch) / "registry")]
        # A core is left to those who ask and publish.
        arguments += ["--device", "cpu", "--threads", "1", "--http-port", "0"]
        arguments += ["--adapter-memory", ADAPTER_MEMORY, "--host-adapter-memory", HOST_MEMORY]
        arguments += ["--engine-process"] if engine_process else []
        with ServerProcess(arguments, Path(scratch)) as server:
            console.print(f"soaking a server for {minutes:g} minutes")
            kept.measure(
                lambda: soak(server, library, prompts, Pace(minutes=minutes, callers=CALLERS))
            )
    kept.finish(console, table_of)


def figures(records: Sequence[dict[str, Any]]) -> list[tuple[str, float | None, float]]:
    """Return every figure that has a bar: name, value (None: not measured), the most it may be."""
    soaks = [r for r in records if r["kind"] == "soak" and r["accepted"]]
    grown = slopes(soaks[-1]["series"]) if soaks else {}
    return [
        (f"{NAMED[key]}: growth in an hour", grown.get(key), most) for key, most in GROWTH.items()
    ]


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return what stood where, and what grew, as Markdown."""
    soaked = records[-1]
    lines = [
        row(["the least of", "at a third", "at the end", "growth in an hour", "bar", ""]),
        row(["---", "---:", "---:", "---:", "---", "---"]),
    ]
    for key, most in GROWTH.items():
        slope, start = line(soaked["series"], key)
        hours = [at_hours for at_hours, _ in lows(soaked["series"], key)]
        ends = [f"{start + slope * at_hours:.1f}" for at_hours in (hours[0], hours[-1])]
        told = "ok" if slope <= most else "short"
        lines.append(row([NAMED[key], *ends, f"{slope:.2f}", f"at most {most:g}", told]))
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup, soaked = records[0]["setup"], records[-1]
    return "\n".join(
        [
            f"{origin(records[0])}; {setup['minutes']:g} minutes, {setup['callers']} callers, "
            f"{setup['adapters']} adapters of rank {setup['rank']}: {soaked['answers']} answers, "
            f"{soaked['given_up']} given up, {soaked['published']} versions published; others used "
            f"{soaked['load']['foreign_cores']:.2f} cores. Straight lines (Theil and Sen) through the least of "
            f"each twentieth of the last two thirds. Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )


def draw(series: Sequence[dict[str, float]], path: Path) -> None:
    """Write an SVG: everything over time, with the straight lines."""
    with panels(path, len(GROWTH), (2.6, 2.2)) as (_, axes):
        for axis, key in zip(axes, GROWTH, strict=True):
            minutes = [sample["at_s"] / 60 for sample in series]
            axis.plot(minutes, [sample[key] for sample in series], color="#0072B2", linewidth=1)
            slope, start = line(series, key)
            hours = [at_hours for at_hours, _ in lows(series, key)]
            ends = [hours[0], hours[-1]]
            fitted = [start + slope * at_hours for at_hours in ends]
            axis.plot([60 * at_hours for at_hours in ends], fitted, color="#D55E00", linewidth=2)
            axis.set_title(NAMED[key], fontsize=10)
            axis.set_xlabel("minutes")
