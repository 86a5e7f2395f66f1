"""The order of events of ``lifecycle``, its figures and its table."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.threads import pin_threads, unbind
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import origin, row
from benchmarks.synthetic import RANK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.lifecycle_parts import Engines

NAME = "lifecycle"
CHURN, STILL = "churn", "still"
PARTS = ("known", "first token", "arrivals", "zipf")
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 5,
    cold: Annotated[int, typer.Option(min=1, help="Cold adapters that arrive.")] = 200,
    gap: Annotated[float, typer.Option(min=0.0, help="Seconds between their arrivals.")] = 0.15,
    fitting: Annotated[
        int, typer.Option(min=16, help="Adapters that the small engine holds.")
    ] = 32,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a run of 'zipf'.")] = 96,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once of 'zipf'.")] = 16,
    sampled: Annotated[int, typer.Option(min=1, help="Adapters of a run of 'first token'.")] = 16,
    num_known: Annotated[int, typer.Option("--known", min=2, help="Adapters known.")] = 10_000,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Measure this part; of {', '.join(PARTS)}.")
    ] = None,
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure what loads and evictions cost those who need none, and those who wait for one."""
    if table:
        options.show(NAME, out, section)
        return
    options.known(only or (), PARTS)
    setup = {
        "base": base,
        "dtype": "bfloat16",
        "threads": pin_threads(threads),
        "repeats": repeats,
        "cold": cold,
        "gap_s": gap,
        "fitting": fitting,
        "requests": requests,
        "concurrency": concurrency,
        "sampled": sampled,
        "known": num_known,
        "rank": RANK,
    }
    unbind()
    path = out or result_path(NAME)
    kept = Kept(path, head(NAME, setup), Quiet(tolerate=tolerate_load, retries=retries))
    with tempfile.TemporaryDirectory(prefix="lorary-lifecycle-") as scratch:
        _run(Path(scratch), kept, setup, tuple(only or PARTS))
    kept.finish(console, table_of)


def _run(scratch: Path, kept: Kept, setup: dict[str, Any], parts: Sequence[str]) -> None:
    from benchmarks import lifecycle_parts as measured
    from lorary.bases import find_base

    model = find_base(setup["base"])
    started_s = time.monotonic()
    repeats = range(setup["repeats"])
    for repeat in repeats if "known" in parts else ():
        _keep(kept, "known", "", repeat, lambda: measured.known(model, scratch, setup["known"]))
    if set(parts) == {"known"}:
        return
    with console.status("making adapters") as status:
        engines = measured.start(scratch, model, setup, status.update)
    with closing(engines):
        console.print(f"set up in {time.monotonic() - started_s:.0f} s")
        for repeat in repeats if "first token" in parts else ():
            for where in (measured.WARM, measured.HOST, measured.DISK):
                _keep(
                    kept,
                    "first token",
                    where,
                    repeat,
                    lambda w=where, r=repeat: measured.first_token(  # type: ignore[misc]
                        engines, w, r, count=setup["sampled"]
                    ),
                )
        for part in ("arrivals", "zipf"):
            for repeat in repeats if part in parts else ():
                for case in (STILL, CHURN) if repeat % 2 == 0 else (CHURN, STILL):
                    _keep(
                        kept, part, case, repeat, _part(engines, scratch, setup, part, case, repeat)
                    )


def _part(
    engines: Engines, scratch: Path, setup: dict[str, Any], part: str, case: str, repeat: int
) -> Callable[[], dict[str, Any]]:
    from benchmarks import lifecycle_parts as measured

    if part == "arrivals":
        return lambda: measured.arrivals(engines, case, repeat, gap_s=setup["gap_s"])
    return lambda: measured.zipf(
        engines,
        case,
        repeat,
        requests=setup["requests"],
        concurrency=setup["concurrency"],
        folder=scratch / "registry",
    )


def _keep(
    kept: Kept, kind: str, case: str, repeat: int, measure: Callable[[], dict[str, Any]]
) -> None:
    """Keep what one case of a part measures, and print every attempt."""

    def make() -> dict[str, Any]:
        found = measure()
        console.print(f"{kind} {case}: {_said(found)}")
        return {"kind": kind, "case": case, "repeat": repeat, **found}

    record = kept.measure(make)
    console.print(f"{kind} {case}: others took {record['load']['foreign_cores']:.2f} cores")


def medians(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Return the median over accepted runs of every number, by kind, case and ``figure.percentile``."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        if record.get("kind") not in PARTS or not record["accepted"]:
            continue
        for key, value in record.items():
            numbers = value if isinstance(value, dict) else {"": value}
            for part, number in numbers.items():
                if isinstance(number, int | float) and not isinstance(number, bool):
                    place = (record["kind"], record["case"], f"{key}.{part}".rstrip("."))
                    values.setdefault(place, []).append(number)
    return {place: statistics.median(found) for place, found in values.items()}


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return every figure as Markdown, with what it is compared with."""
    found = medians(records)
    lines = [row(["figure", "with loads", "without", "ratio"]), row(["---", *["---:"] * 3])]

    def add(text: str, of: tuple[str, str, str], to: tuple[str, str, str], unit: str) -> None:
        if of in found and to in found:
            cells = [f"{found[of]:.1f} {unit}", f"{found[to]:.1f} {unit}"]
            lines.append(row([text, *cells, f"{found[of] / found[to]:.2f}"]))

    for p in ("p50", "p95", "p99"):
        add(
            f"{p} between tokens of hot adapters while cold ones arrive",
            ("arrivals", CHURN, f"itl_ms.{p}"),
            ("arrivals", STILL, f"itl_ms.{p}"),
            "ms",
        )
    for where in ("host", "disk"):
        add(
            "median first token of an adapter in host memory, and of a warm one"
            if where == "host"
            else "median first token of an adapter on the disk, and of a warm one",
            ("first token", where, "first_token_ms.p50"),
            ("first token", "warm", "first_token_ms.p50"),
            "ms",
        )
    add(
        "output tokens/s with 4 times as many adapters as fit, and with all resident",
        ("zipf", CHURN, "output_tokens_per_s"),
        ("zipf", STILL, "output_tokens_per_s"),
        "",
    )
    for text, key, scale, unit in (
        ("resolving a ref (name@alias), median", "resolve_us.p50", 1.0, "µs"),
        ("memory that the known adapters add", "added_bytes", 1e-6, "MB"),
    ):
        if ("known", "", key) in found:
            lines.append(row([text, f"{found['known', '', key] * scale:.1f} {unit}", "-", "-"]))
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup, found = records[0]["setup"], medians(records)
    loads = {part: found.get((part, CHURN, "loads"), 0.0) for part in ("arrivals", "zipf")}
    return "\n".join(
        [
            f"{origin(records[0])}; adapters of rank {setup['rank']} on every linear layer, memory for "
            f"{setup['fitting']}; {setup['cold']} cold adapters, {setup['gap_s']:g} s apart "
            f"({loads['arrivals']:.0f} loads); Zipf traffic of {setup['requests']} requests, "
            f"{setup['concurrency']} at once ({loads['zipf']:.0f} loads); first tokens of "
            f"{setup['sampled']} adapters; {setup['known']} known adapters; medians of {setup['repeats']} "
            f"runs. Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )


def _said(found: dict[str, Any]) -> str:
    shown = []
    for key, value in found.items():
        if isinstance(value, dict):
            shown.append(f"{key} {' / '.join(f'{v:.4g}' for v in value.values())}")
        else:
            shown.append(f"{key} {value}")
    return ", ".join(shown)
