"""The order of events of ``capacity``, and its tables."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.capacity_model import (
    NUM_LOADERS,
    Fleet,
    Plan,
    copies_needed,
    hit_ratio,
    hottest_share,
    plan_balanced,
    plan_ring,
    ring_hit_ratio,
)
from benchmarks.capacity_sim import POLICIES, Policy, Seen, simulate
from benchmarks.harness.machine import ROOT, head, newest_results, result_path
from benchmarks.markdown import row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAME = "capacity"
DOCUMENT = ROOT / "docs" / "scaling.md"
ZIPFS = (0.8, 1.0, 1.2)
UTILISATION = 0.6
"""Rows that the calls of a simulated fleet keep busy."""
ANSWER_S, LOAD_S = 2.0, 0.3
# Name, adapters, replicas, rows, places, calls to simulate.
SIZES: tuple[tuple[str, int, int, int, int, int], ...] = (
    ("small", 100, 4, 16, 32, 100_000),
    ("small", 1_000, 16, 32, 64, 300_000),
    ("large", 10_000, 100, 32, 128, 1_500_000),
    ("huge", 10_000, 1_000, 32, 64, 1_000_000),
)
# Adapters, calls a second, rows, places, Zipf: plans that are put to the test.
PLANNED: tuple[tuple[int, float, int, int, float], ...] = (
    (200, 20.0, 16, 64, 1.0),
    (2_000, 60.0, 32, 100, 1.0),
    (2_000, 60.0, 32, 100, 0.8),
    (10_000, 200.0, 32, 500, 1.0),
)
DROWNED = 0.9
"""Share of the loading threads' time from which on loads wait for loads."""
PLANNED_CALLS = 1_000_000
HITS = 0.99

console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    only: Annotated[str, typer.Option(help="small, large, huge or plans; all if not given.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Say what one fleet needs.")] = False,
    adapters: Annotated[int, typer.Option(min=1, help="With --plan: how many.")] = 1000,
    zipf: Annotated[float, typer.Option(min=0.0, max=3.0, help="How unlike their traffic is.")] = 1,
    calls: Annotated[float, typer.Option(min=0.001, help="Calls a second.")] = 10.0,
    answer: Annotated[float, typer.Option(min=0.001, help="Seconds of an answer.")] = 2.0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a replica.")] = 32,
    places: Annotated[int, typer.Option(min=1, help="Adapters that fit on one.")] = 256,
    load: Annotated[float, typer.Option(min=0.0, help="Seconds of a load.")] = 0.3,
    hits: Annotated[float, typer.Option(min=0.01, max=1.0, help="Calls without a load.")] = HITS,
    out: options.Out = None,
    table: Annotated[
        bool, typer.Option("--table", help="Only render into docs/scaling.md.")
    ] = False,
) -> None:
    """Hold the closed form against the simulation, or plan one fleet."""
    if plan:
        fleet = Fleet(
            num_adapters=adapters, zipf=zipf, calls_per_s=calls, answer_s=answer, rows=rows,
            adapters_per_replica=places, load_s=load,
        )  # fmt: skip
        typer.echo(told("a router that knows (Ray Serve)", plan_balanced(fleet, hits=hits)))
        typer.echo(told("a ring of hashes (affinity=)", plan_ring(fleet, hits=hits)))
        return
    if table:
        path = out or newest_results(NAME)
        report.write_section(DOCUMENT, NAME, section(report.read(path), path))
        return
    path = out or result_path(NAME)
    first = head(NAME, {"utilisation": UTILISATION, "answer_s": ANSWER_S, "load_s": LOAD_S})
    for record in records(only):
        console.print(record)
        report.append(path, {**first, **record})
    console.print(f"records: {path}")


def told(who: str, plan: Plan) -> str:
    """Return a plan in one line."""
    return (
        f"{who}: {plan.replicas} replicas, for the sake of {plan.because}; {plan.hit_ratio:.1%} of "
        f"calls find their adapter, the hottest one is on {plan.spread}, the busiest replica has "
        f"{plan.hottest:.0%} of its rows in use"
    )


def records(only: str) -> Iterator[dict[str, Any]]:
    """Yield a record of every simulation and what the closed form says to it."""
    for group, adapters, replicas, rows, places, calls in SIZES:
        if only not in ("", group):
            continue
        # A thousand replicas take minutes, so once.
        for zipf in ZIPFS if group != "huge" else (1.0,):
            fleet = Fleet(
                num_adapters=adapters,
                zipf=zipf,
                calls_per_s=UTILISATION * replicas * rows / ANSWER_S,
                answer_s=ANSWER_S,
                rows=rows,
                adapters_per_replica=places,
                load_s=LOAD_S,
            )
            for policy in POLICIES:
                yield one(fleet, replicas, policy, calls)
    if only in ("", "plans"):
        yield from plans()


def one(fleet: Fleet, replicas: int, policy: Policy, calls: int) -> dict[str, Any]:
    """Simulate one fleet with one router."""
    spread = spread_of(fleet) if policy in ("ring", "bounded") else 1
    seen = simulate(fleet, replicas, policy, spread=spread, calls=calls)
    return {
        "kind": "policy",
        "fleet": asdict(fleet),
        "replicas": replicas,
        "policy": policy,
        "spread": spread,
        "calls": calls,
        "seen": rounded(seen),
        "model": predicted(fleet, replicas, policy, spread),
    }


def spread_of(fleet: Fleet) -> int:
    """Return what a ring's clients should be told: the copies that the hottest adapter needs."""
    return int(copies_needed(fleet, 0.85)[0])


def predicted(fleet: Fleet, replicas: int, policy: Policy, spread: int) -> dict[str, float] | None:
    """Return what the closed form says; None of what it says nothing of."""
    shares, places = fleet.popularity(), fleet.adapters_per_replica
    utilisation = fleet.busy_rows / fleet.rows
    if policy == "bounded":
        return None
    if policy == "ring":
        found = ring_hit_ratio(shares, spread, replicas, places)
        hottest = hottest_share(shares, spread, replicas) * utilisation
        return {"miss_ratio": round(1 - found, 5), "hottest": round(hottest, 4)}
    copies: Any = float(replicas)
    if policy == "multiplex":
        copies = copies_needed(fleet, 1.0).clip(max=replicas)
    return {"miss_ratio": round(1 - hit_ratio(shares, copies, replicas * places), 5)}


def plans() -> Iterator[dict[str, Any]]:
    """Yield what a plan says, and what a fleet of that size, and of three quarters of it, sees."""
    for adapters, calls_per_s, rows, places, zipf in PLANNED:
        fleet = Fleet(
            num_adapters=adapters,
            zipf=zipf,
            calls_per_s=calls_per_s,
            answer_s=ANSWER_S,
            rows=rows,
            adapters_per_replica=places,
            load_s=LOAD_S,
        )
        for policy, planned in (
            ("multiplex", plan_balanced(fleet, hits=HITS)),
            ("ring", plan_ring(fleet, hits=HITS)),
        ):
            for share in (1.0, 0.75):
                fewer = replace(planned, replicas=max(1, int(planned.replicas * share)))
                seen = simulate(
                    fleet,
                    fewer.replicas,
                    policy,  # type: ignore[arg-type]
                    spread=planned.spread if policy == "ring" else 1,
                    calls=PLANNED_CALLS,
                )
                yield {
                    "kind": "plan",
                    "fleet": asdict(fleet),
                    "policy": policy,
                    "plan": asdict(planned),
                    "share": share,
                    "replicas": fewer.replicas,
                    "seen": rounded(seen),
                }


def rounded(seen: Seen) -> dict[str, float]:
    """Return what was seen, in as many digits as are true."""
    return {key: round(value, 5) for key, value in asdict(seen).items()}


# -- tables ------------------------------------------------------------------------------------------


def section(found: Sequence[dict[str, Any]], path: Path) -> str:
    """Return what stands between the markers."""
    return "\n".join(
        [
            policy_table([r for r in found if r["kind"] == "policy"]),
            "",
            plan_table([r for r in found if r["kind"] == "plan"]),
            "",
            f"Records: `benchmarks/results/{path.name}`.",
        ]
    )


def policy_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the fleets of Zipf 1.0, router by router, and the largest errors over all."""
    lines = [
        row(["adapters, replicas", "router", "calls that load: seen", "closed form",
             "rows of the busiest replica: used", "asked, closed form", "wait p99", "copies"]),
        row(["---", "---", "---:", "---:", "---:", "---:", "---:", "---:"]),
    ]  # fmt: skip
    errors: dict[str, float] = {}
    for record in found:
        seen, model, policy = record["seen"], record["model"], record["policy"]
        if model is not None and not is_drowned(record):
            error = abs(seen["miss_ratio"] - model["miss_ratio"])
            errors[policy] = max(errors.get(policy, 0.0), error)
        if record["fleet"]["zipf"] != 1.0:
            continue
        name = f"{policy}, spread {record['spread']}" if record["spread"] > 1 else policy
        size = f"{record['fleet']['num_adapters']:,}, {record['replicas']:,}"
        says = {} if model is None else {k: f"{v:.2%}" for k, v in model.items()}
        lines.append(
            row(
                [
                    size,
                    name,
                    f"{seen['miss_ratio']:.2%}",
                    says.get("miss_ratio", ""),
                    f"{seen['hottest']:.0%}",
                    f"{model['hottest']:.0%}" if model and "hottest" in model else "",
                    f"{seen['wait_p99_s']:.2f} s",
                    f"{seen['copies']:.1f}",
                ]
            )
        )
    worst = ", ".join(f"{policy} {100 * error:.1f}" for policy, error in errors.items())
    lines += [
        "",
        "Largest error of the closed form's share of calls that load, over Zipf "
        f"{', '.join(map(str, ZIPFS))}, in points of percent: {worst}. Without fleets whose loads take more than "
        f"{DROWNED:.0%} of their threads' time: there loads wait for loads, callers share them, and fewer begin.",
    ]
    return "\n".join(lines)


def is_drowned(record: dict[str, Any]) -> bool:
    """Whether a fleet's loads, by the closed form, are more than its threads can do."""
    fleet, missed = record["fleet"], record["model"]["miss_ratio"]
    loads_per_s = fleet["calls_per_s"] * missed / record["replicas"]
    return bool(loads_per_s * fleet["load_s"] > DROWNED * NUM_LOADERS)


def plan_table(found: Sequence[dict[str, Any]]) -> str:
    """Return plans beside what their fleets saw."""
    lines = [
        row(["adapters, calls/s, Zipf", "router", "planned, for the sake of", "simulated",
             "calls that load", "busiest replica", "wait p99"]),
        row(["---", "---", "---", "---:", "---:", "---:", "---:"]),
    ]  # fmt: skip
    for record in found:
        fleet, plan, seen = record["fleet"], record["plan"], record["seen"]
        lines.append(
            row(
                [
                    f"{fleet['num_adapters']:,}, {fleet['calls_per_s']:g}, {fleet['zipf']:g}",
                    record["policy"],
                    f"{plan['replicas']}, {plan['because']}",
                    f"{record['replicas']}",
                    f"{seen['miss_ratio']:.2%}",
                    f"{seen['hottest']:.0%}",
                    f"{seen['wait_p99_s']:.2f} s",
                ]
            )
        )
    return "\n".join(lines)
