"""``lorary bench``: load on a running server, and what its callers would see."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorary.cli.call import JsonOption, TargetOption
from lorary.cli.load import PERCENTILES, Outcome, Plan, Report, run, summarize
from lorary.client import AsyncClient
from lorary.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from lorary.errors import InvalidRequest
from lorary.registry.cli_support import console, print_json, table

if TYPE_CHECKING:
    from collections.abc import Callable

    MakePlan = Callable[[tuple[str, ...], tuple[tuple[int, ...], ...]], Plan]

app = typer.Typer(name="bench", add_completion=False, pretty_exceptions_enable=False)

TEXT = (
    "A library lends what it keeps. Whoever comes asks for one thing by its name, takes it for as long "
    "as it is needed, and brings it back; the shelves stay where they are. What is asked for often lies "
    "near the door, what is asked for seldom waits in the cellar, and nobody who reads is disturbed when "
    "something is fetched. "
)
NUM_PROMPTS = 32
TOP = 10


@app.command(epilog="Example: lorary bench --adapter a@prod --adapter b@prod --zipf 1 --rate 5")
def bench(
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Ask this ref, the most popular first; may be repeated."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="Ask every adapter of the server's registry.")
    ] = False,
    zipf: Annotated[
        float, typer.Option(min=0.0, max=5.0, help="Skew of their popularity; 0 asks all alike.")
    ] = 0.0,
    calls: Annotated[int, typer.Option("--calls", "-n", min=1, help="Calls in all.")] = 128,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, max=4096, help="Most calls at once.")
    ] = 32,
    rate: Annotated[
        float,
        typer.Option(
            min=0.0, help="Calls a second at random moments; 0: the next when one has ended."
        ),
    ] = 0.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of the answers.")] = 64,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text to cut prompts from.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    records: Annotated[
        Path | None, typer.Option(help="Write every call's outcome there, a JSON object a line.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the latencies there (.svg, .png); needs matplotlib.")
    ] = None,
    target: TargetOption = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Load a server and report throughput and latency; exit code 1 when a call failed.

    Answers have their full length, whatever they say. Latencies count from the moment a call was due.
    """
    if every and adapter:
        raise InvalidRequest("--every asks all adapters; leave out --adapter, or --every.")
    text = TEXT if prompt_file is None else prompt_file.read_text(encoding="utf-8")
    asked = _Asked(tuple(adapter or ()), every, text, prompt_tokens)
    plan, outcomes = asyncio.run(
        _measure(
            target,
            timeout,
            asked,
            lambda adapters, prompts: Plan(
                adapters=adapters,
                skew=zipf,
                num_calls=calls,
                concurrency=concurrency,
                rate=rate,
                prompts=prompts,
                new_tokens=max_tokens,
                seed=seed,
            ),
        )
    )
    report = summarize(outcomes)
    if records is not None:
        lines = (json.dumps(dataclasses.asdict(outcome)) + "\n" for outcome in outcomes)
        records.write_text("".join(lines))
    if plot is not None:
        from lorary.cli.bench_plot import draw

        draw(plot, outcomes, report)
    if as_json:
        print_json(report)
    else:
        _print(target, plan, report)
    if report.errors:
        raise typer.Exit(1)


@dataclasses.dataclass(frozen=True)
class _Asked:
    adapters: tuple[str, ...]
    every: bool
    text: str
    prompt_tokens: int


async def _measure(
    target: str, timeout_s: float, asked: _Asked, make_plan: MakePlan
) -> tuple[Plan, list[Outcome]]:
    async with AsyncClient(target, timeout_s=timeout_s) as client:
        adapters = asked.adapters or ("",)
        if asked.every:
            adapters = tuple(f"{a.name}@{a.version}" for a in await client.list_adapters())
            if not adapters:
                raise InvalidRequest("the server's registry has no adapters; leave out --every.")
        plan = make_plan(adapters, await _prompts(client, asked.text, asked.prompt_tokens))
        stderr = Console(stderr=True)
        columns = (TextColumn("calls"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=stderr, transient=True, disable=not stderr.is_terminal
        ) as bar:
            task = bar.add_task("", total=plan.num_calls)
            outcomes = await run(client, plan, on_end=lambda _: bar.advance(task))
        return plan, outcomes


async def _prompts(client: AsyncClient, text: str, length: int) -> tuple[tuple[int, ...], ...]:
    """Cut prompts of ``length`` tokens from a text, each from another place."""
    ids = (await client.tokenize(prompt=text)).token_ids
    if not ids:
        raise InvalidRequest("the text to cut prompts from has no tokens; give another one.")
    around = ids * (2 + length // len(ids))
    stride = max(1, len(ids) // NUM_PROMPTS)
    starts = range(0, len(ids), stride)
    return tuple(tuple(around[start : start + length]) for start in starts)[:NUM_PROMPTS]


def _print(target: str, plan: Plan, report: Report) -> None:
    how = f"{plan.rate:g} calls/s" if plan.rate else f"{plan.concurrency} at once"
    rows = table("load", target)
    rows.add_row("calls", f"{report.num_calls}, {how}, in {report.seconds:.1f} s")
    rows.add_row(
        "each", f"{len(plan.prompts[0])} prompt + {plan.new_tokens} new tokens, seed {plan.seed}"
    )
    rows.add_row("adapters", f"{len(plan.adapters)}, Zipf {plan.skew:g}")
    rows.add_row("answers", f"{report.num_answers}, {report.answers_per_s:.2f} a second")
    rows.add_row("tokens", f"{report.tokens_per_s:.0f} a second")
    rows.add_row("failed", ", ".join(f"{n} {e}" for e, n in report.errors.items()) or "none")
    times = table("milliseconds", *(f"p{p}" for p in PERCENTILES))
    for name, found in (
        ("first token", report.first_token_ms),
        ("next token", report.next_token_ms),
        ("whole answer", report.whole_ms),
    ):
        times.add_row(name, *(f"{v:.1f}" for v in found.values()))
    screen = console()
    screen.print(rows, times, sep="\n\n")
    if len(report.calls_by_adapter) > 1:
        shares = table("adapter", "calls")
        for name, count in list(report.calls_by_adapter.items())[:TOP]:
            shares.add_row(name or "(base)", str(count))
        if (more := len(report.calls_by_adapter) - TOP) > 0:
            shares.add_row(f"and {more} more", "")
        screen.print()
        screen.print(shares)
