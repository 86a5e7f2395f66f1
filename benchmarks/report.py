"""Records on disk (JSON lines), their medians, and the table in docs/benchmarks.md."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.markdown import row as _row

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DRAWN = {"uniform": "uniformly", "zipf": "by Zipf's law", "distinct": "in turn"}


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One place in the matrix."""

    adapters: int
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """Medians over the accepted repeats of one contender in one cell; latencies in ms."""

    tokens_per_s: float
    ttft: dict[str, float]
    itl: dict[str, float]
    repeats: int
    foreign: float


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record, so that an interrupted run keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return all records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def medians(records: Sequence[dict[str, Any]]) -> dict[str, dict[Cell, Median]]:
    """Return contender → cell → medians. Runs that were not accepted do not count."""
    groups: dict[tuple[str, Cell], list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "run" and record["accepted"]:
            cell = Cell(record["adapters"], record["concurrency"])
            groups.setdefault((record["contender"], cell), []).append(record)
    found: dict[str, dict[Cell, Median]] = {}
    for (contender, cell), runs in groups.items():
        found.setdefault(contender, {})[cell] = Median(
            tokens_per_s=statistics.median(r["output_tokens_per_s"] for r in runs),
            ttft=_median_of(runs, "ttft_ms"),
            itl=_median_of(runs, "itl_ms"),
            repeats=len(runs),
            foreign=max(r["load"]["foreign_cores"] for r in runs),
        )
    return found


def ratio(found: dict[str, dict[Cell, Median]], cell: Cell, of: str, to: str) -> float | None:
    """Return how many times ``to``'s tokens per second ``of`` makes; None when one is missing."""
    first, second = found.get(of, {}).get(cell), found.get(to, {}).get(cell)
    if first is None or second is None:
        return None
    return first.tokens_per_s / second.tokens_per_s


def of_base(records: Sequence[dict[str, Any]], contender: str, cell: Cell) -> float | None:
    """Return the share of a contender's own tokens per second without adapters that ``cell`` reaches.

    The median over repeats of the share within each: a shared machine's speed changes from one repeat to the next
    by more than adapters cost, and two runs of one repeat have most of that in common. None without such a repeat.
    """
    speed = {
        (record["repeat"], record["adapters"]): record["output_tokens_per_s"]
        for record in records
        if record["kind"] == "run"
        and record["accepted"]
        and (record["contender"], record["concurrency"]) == (contender, cell.concurrency)
    }
    shares = [
        tokens_per_s / speed[repeat, 0]
        for (repeat, adapters), tokens_per_s in speed.items()
        if adapters == cell.adapters and (repeat, 0) in speed
    ]
    return statistics.median(shares) if shares else None


def best_peer(found: dict[str, dict[Cell, Median]], cell: Cell) -> str | None:
    """Return the contender that is not ours and makes most tokens per second; None without any."""
    speed = {
        name: cells[cell].tokens_per_s
        for name, cells in found.items()
        if not is_ours(name) and cell in cells
    }
    return max(speed, key=lambda name: speed[name], default=None)


def is_ours(contender: str) -> bool:
    """Return whether a contender is Lorary, in whatever form."""
    return contender.startswith("lorary")


def table(records: Sequence[dict[str, Any]], peer: str = "peft") -> str:
    """Return the matrix as Markdown: a row per cell, ours beside the peer's and our own base-only.

    With more than one peer a contender has one column, and ours are compared with the best peer of
    the row.
    """
    found = medians(records)
    if any(not is_ours(name) and name != peer for name in found):
        return _wide_table(found)
    ours = [name for name in found if name != peer]
    has_bare = any(cell.adapters == 0 for cells in found.values() for cell in cells)
    names = [*ours, *([peer] if peer in found else [])]
    head = ["adapters", "requests at once"]
    for name in names:
        head += [f"{name}: tokens/s", "first token, ms", "next token, ms"]
    head += [f"{name} / {peer}" for name in ours if peer in found]
    head += [f"{name} / no adapter" for name in ours if has_bare]
    lines = [_row(head), _row(["---:"] * len(head))]
    for cell in sorted({cell for cells in found.values() for cell in cells}):
        row = [str(cell.adapters), str(cell.concurrency)]
        for name in names:
            median = found[name].get(cell)
            row += _columns(median) if median else ["-", "-", "-"]
        for name in ours if peer in found else ():
            times = ratio(found, cell, name, peer)
            row.append("-" if times is None else f"{times:.1f}x")
        for name in ours if has_bare else ():
            share = of_base(records, name, cell) if cell.adapters else None
            row.append("-" if share is None else f"{share:.0%}")
        lines.append(_row(row))
    return "\n".join(lines)


def _wide_table(found: dict[str, dict[Cell, Median]]) -> str:
    ours = [name for name in found if is_ours(name)]
    names = [*ours, *(name for name in found if not is_ours(name))]
    head = ["adapters", "requests at once", *names, *(f"{name} / best peer" for name in ours)]
    lines = [_row(head), _row(["---:"] * len(head))]
    for cell in sorted({cell for cells in found.values() for cell in cells}):
        row = [str(cell.adapters), str(cell.concurrency)]
        for name in names:
            median = found[name].get(cell)
            row.append(f"{median.tokens_per_s:.0f} ({median.ttft['p50']:.0f})" if median else "-")
        best = best_peer(found, cell)
        for name in ours:
            times = None if best is None else ratio(found, cell, name, best)
            row.append("-" if times is None else f"{times:.1f}x ({best})")
        lines.append(_row(row))
    return "\n".join(
        ["Output tokens/s, in brackets the median time to the first token in ms:", "", *lines]
    )


def section(path: Path) -> str:
    """Return what stands between the markers: how it was measured, agreement, the table."""
    records = read(path)
    head = next(r for r in records if r["kind"] == "run")
    machine, setup = head["machine"], head["setup"]
    worst = max(r["load"]["foreign_cores"] for r in records if r.get("accepted"))
    lines = [
        f"{head['date']}, {machine['cpu']} ({machine['cores']} cores, "
        f"{', '.join(machine['vector_units'])}), torch {head['versions']['torch']}, "
        f"{_peer_versions(head['versions'])}, commit `{head['commit'][:12]}`"
        f"{' with local changes' if head['modified'] else ''}; base {setup['base']} in "
        f"{setup['dtype']}, {setup['threads']} pinned threads; adapters of rank {setup['rank']} on "
        f"every linear layer, drawn {DRAWN[setup['popularity']]}; {setup['prompt_tokens']} prompt + "
        f"{setup['new_tokens']} new tokens, greedy, end tokens ignored, at least "
        f"{setup['min_requests']} requests a run. Medians of {setup['repeats']} repeats; latencies are p50 / p95 / p99; other processes took at most "
        f"{worst:.2f} cores. Records: `benchmarks/results/{path.name}`.",
        "",
        table(records),
    ]
    checks = [r for r in records if r["kind"] == "agreement"]
    if checks:
        lines += ["", "Agreement, measured before the speed:", "", *_agreement(checks)]
    return "\n".join(lines)


def _peer_versions(versions: dict[str, str]) -> str:
    from benchmarks.peers.catalog import PEERS

    return ", ".join(f"{name} {versions[name]}" for name in ("peft", *PEERS) if name in versions)


def markers(name: str) -> tuple[str, str]:
    """Return the lines around the table of this name in a document."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_section(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of this name in ``document``.

    Raises:
        ValueError: it has no such markers.
    """
    begin, end = markers(name)
    content = document.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{document} lacks the markers {begin} and {end}")
    document.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content))


def _agreement(checks: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        _row(["contender", "against", "equal before the first difference", "whole answers",
              "equal telling tokens"]),
        _row(["---", "---", "---:", "---:", "---:"]),
    ]  # fmt: skip
    for check in checks:
        has_answers = check["num_answers"] > 0
        share = check["telling_tokens"]
        lines.append(
            _row(
                [
                    check["contender"],
                    check["against"],
                    f"{check['free_running']:.0%}" if has_answers else "-",
                    f"{check['whole_answers']} of {check['num_answers']}" if has_answers else "-",
                    "-" if share is None else f"{share:.0%}",
                ]
            )
        )
    return lines


def _median_of(runs: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    return {p: statistics.median(r[key][p] for r in runs) for p in ("p50", "p95", "p99")}


def _columns(median: Median) -> list[str]:
    shown = [f"{median.tokens_per_s:.0f}"]
    for latency, digits in ((median.ttft, 0), (median.itl, 1)):
        shown.append(" / ".join(f"{latency[p]:.{digits}f}" for p in ("p50", "p95", "p99")))
    return shown
