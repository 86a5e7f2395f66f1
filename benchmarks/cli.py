"""The command line of the serving benchmark, and its order of events."""

from __future__ import annotations

import random
import re
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta

from benchmarks import options, report
from benchmarks.contenders.peers import missing
from benchmarks.contenders.peers import versions as peer_versions
from benchmarks.harness.machine import DOCUMENT, head, result_path
from benchmarks.harness.threads import pin_threads
from benchmarks.kept import Quiet, make_all
from benchmarks.peers.catalog import CONTENDERS
from benchmarks.plan import SEED, Plan, Popularity, Through
from benchmarks.plot import draw

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from benchmarks.workload import Contender

PEER = "peft"
INT8 = "lorary-int8"
console = Console(stderr=True)


def main(
    adapters: Annotated[str, typer.Option(help="Numbers of adapters.")] = "0,1,8,32",
    concurrency: Annotated[str, typer.Option(help="Numbers of requests at once.")] = "1,8,32",
    cells: Annotated[
        str,
        typer.Option(help="Instead of all pairs: adapters x requests at once, as in 32x32,0x8."),
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each cell and contender.")] = 3,
    contenders: Annotated[
        str,
        typer.Option(
            help="Of lorary, lorary-int8 (8-bit weights), peft, and what `make peers` installs: "
            f"{', '.join(CONTENDERS)}."
        ),
    ] = "lorary,peft",
    through: Annotated[Through, typer.Option(help="What Lorary is measured through.")] = (
        Through.engine
    ),
    popularity: Annotated[Popularity, typer.Option(help="How adapters are drawn.")] = (
        Popularity.uniform
    ),
    base: options.Base = options.BASE,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: options.Threads = 0,
    prompt_tokens: options.PromptTokens = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Least requests of a run.")] = 8,
    rounds: Annotated[
        int, typer.Option(min=1, help="Requests of a run, as a multiple of those at once.")
    ] = 2,
    interleave: Annotated[
        bool,
        typer.Option(
            "--interleave", help="Take the cells in turn as well, where they are compared."
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="8 adapters, 8 requests, once.")] = False,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    name: Annotated[
        str, typer.Option(help="Of the result file and of the table's place in the docs.")
    ] = "serving",
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure Lorary and its peers on the same requests."""
    if table:
        path = options.show(name, out, report.section)
        picture = DOCUMENT.with_name(f"{name}.svg")
        if picture.name in DOCUMENT.read_text():
            draw(report.read(path), picture)
        return
    threads = pin_threads(threads)
    chosen_cells = _cells(cells)
    # A server process is stopped on the way out, whoever asks for it.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    plan = Plan(
        base=base,
        dtype=dtype,
        threads=threads,
        adapters=tuple(k for k, _ in chosen_cells)
        or ((8,) if quick else _numbers("adapters", adapters, least=0)),
        concurrency=tuple(c for _, c in chosen_cells)
        or ((8,) if quick else _numbers("concurrency", concurrency, least=1)),
        chosen_cells=chosen_cells,
        repeats=1 if quick else repeats,
        contenders=_contenders(contenders, through),
        popularity=popularity,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        min_requests=requests,
        rounds=rounds,
        interleave=interleave,
        agreement_calls=5 if quick else 9,
    )
    path = out or result_path(name)
    first = head(name, plan.record())
    first["versions"] |= peer_versions(plan.contenders)
    with tempfile.TemporaryDirectory(prefix="lorary-bench-") as scratch:
        is_complete = _run(plan, Path(scratch), path, first, tolerate_load, retries)
    console.print(f"\nrecords: {path}")
    Console().print(report.table(report.read(path)), highlight=False, soft_wrap=True)
    if not is_complete:
        console.print("[red]some runs found no quiet machine[/]; wait, or pass --tolerate-load")
        raise typer.Exit(1)


def _run(
    plan: Plan, scratch: Path, path: Path, first: dict[str, Any], tolerate: bool, retries: int
) -> bool:
    from benchmarks.measure import measure
    from benchmarks.setup import build, check
    from benchmarks.workload import Call, awake, choose

    # Cells that are compared repeat by repeat stay side by side, so one is tried again at once.
    at_once, rounds = (retries, 1) if plan.interleave else (0, 1 + retries)
    quiet = Quiet(tolerate=tolerate, retries=at_once)
    with build(plan, scratch, console) as stage, _progress() as progress:
        check(plan, stage, lambda record: report.append(path, {**first, **record}), console)
        runs = [
            (cell, contender)
            for cell in plan.runs
            for contender in _in_turn(stage.contenders, cell[2])
            if contender.can_answer(cell[0])
        ]
        bar = progress.add_task("", total=len(runs))

        def make(run: tuple[tuple[int, int, int], Contender], number: int) -> bool:
            (num_adapters, concurrency, repeat), contender = run
            # The same calls for every contender; others in every repeat.
            rng = random.Random(f"{SEED}/{num_adapters}/{concurrency}/{repeat}")
            names = stage.adapters[:num_adapters]
            count = plan.num_requests(concurrency)
            chosen = choose(names, count, plan.popularity.value, rng)
            prompts = stage.prompts.take(count, plan.prompt_tokens, rng)
            calls = [Call(prompt_ids=p, adapter=a) for p, a in zip(prompts, chosen, strict=True)]
            what = f"{contender.name}: {num_adapters} adapters, {concurrency} requests at once"
            progress.update(bar, description=what)
            is_accepted = False
            with awake(contender, names):
                if repeat == 0:
                    contender.run(calls[:concurrency], concurrency=concurrency, new_tokens=4)
                for found in measure(
                    contender,
                    calls,
                    concurrency=concurrency,
                    new_tokens=plan.new_tokens,
                    quiet=quiet,
                    first=number,
                ):
                    place = {"adapters": num_adapters, "concurrency": concurrency, "repeat": repeat}
                    record = {"kind": "run", "contender": contender.name, **place, **found}
                    report.append(path, {**first, **record})
                    progress.console.print(_line(what, record), highlight=False, soft_wrap=True)
                    is_accepted = bool(found["accepted"])
            progress.advance(bar, is_accepted)
            return is_accepted

        return not make_all(runs, make, rounds)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _in_turn(contenders: Sequence[Contender], repeat: int) -> Sequence[Contender]:
    """Change who goes first from repeat to repeat."""
    return contenders if repeat % 2 == 0 else list(reversed(contenders))


def _line(what: str, run: dict[str, Any]) -> str:
    foreign = run["load"]["foreign_cores"]
    noise = "" if run["quiet"] else f"  [yellow]others took {foreign:.2f} cores[/]"
    return (
        f"{what}: {run['output_tokens_per_s']:.0f} tokens/s, first {run['ttft_ms']['p50']:.0f} ms, "
        f"next {run['itl_ms']['p50']:.1f} ms{noise}"
    )


def _progress() -> Progress:
    # Once a second: drawing must not compete with what is measured.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Eta(),
        console=console,
        refresh_per_second=1,
    )


def _contenders(names: str, through: Through) -> tuple[str, ...]:
    chosen: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name == "lorary":
            chosen += ["lorary"] if through is not Through.grpc else []
            chosen += ["lorary (grpc)"] if through is not Through.engine else []
        elif name in (INT8, PEER, *CONTENDERS):
            chosen.append(name)
        else:
            known = ", ".join(("lorary", INT8, PEER, *CONTENDERS))
            raise typer.BadParameter(f"contender '{name}' is unknown; there are {known}")
    absent = missing(chosen)
    if absent:
        raise typer.BadParameter(
            f'not installed: {", ".join(absent)}. Run: make peers PEERS="{" ".join(absent)}"'
        )
    return tuple(chosen)


def _cells(text: str) -> tuple[tuple[int, int], ...]:
    if not text:
        return ()
    pairs = [re.fullmatch(r"(\d+)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(pairs):
        raise typer.BadParameter(f"--cells is '{text}'; write pairs like 32x32,0x8")
    return tuple((int(pair[1]), int(pair[2])) for pair in pairs if pair)


def _numbers(name: str, text: str, *, least: int) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--{name} is '{text}'; write numbers like 1,8,32") from None
    if min(values) < least:
        raise typer.BadParameter(f"--{name} is '{text}'; the least is {least}")
    return values
