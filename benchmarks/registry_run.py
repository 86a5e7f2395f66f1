"""The order of events of ``registry``, and its table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import ROOT, head, result_path
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import row

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "registry"
CASES = ("transfer", "list", "resolve", "help", "share", "memory")
QUIET = 0.2
"""Most cores that others may use on average."""
BARS = {
    "transfer": (
        "times `cp` + `sha256sum` of 100 MB, once and not synced, for a push and a pull of it",
        1.5,
    ),
    "list": ("seconds to list 10,000 versions", 0.5),
    "resolve": ("milliseconds to resolve a ref, warm", 1.0),
    "help": ("seconds of `registry --help`", 0.3),
    "share": ("bytes stored by a version that shares its files, beside its manifest", 0.0),
    "memory": ("MB of memory that push and pull of 5 GB take at most", 200.0),
}
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times each short figure is taken.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where to work; a temporary folder if not given.")
    ] = None,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Measure a registry in a folder."""
    if table:
        options.show(NAME, out, section)
        return
    options.known(only or (), CASES)
    path = out or result_path(NAME)
    first = head(NAME, {"repeats": repeats, "folder": str(folder or tempfile.gettempdir())})
    kept = Kept(path, first, Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load))
    for case in only or CASES:
        kept.measure(partial(_case, case, 1 if case == "memory" else repeats, folder))
    kept.finish(console, table_of)


def _case(case: str, repeats: int, folder: Path | None) -> dict[str, Any]:
    """Take one figure in new processes, and return the medians."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="lorary-registry-", dir=folder) as scratch:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.harness.registry_case", case, scratch],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                check=True,
            )
            runs.append(json.loads(done.stdout))
            console.print(f"{case}: {runs[-1]}")
    return {"kind": case, **{key: statistics.median(r[key] for r in runs) for key in runs[0]}}


def accepted_cases(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the accepted record of each case."""
    return {r["kind"]: r for r in records if r["accepted"]}


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the figures as Markdown, one a line."""
    found = accepted_cases(records)
    if not found:
        return "nothing was measured on a quiet machine"
    lines = [row(["figure", "measured", "bar"]), row(["---", "---:", "---:"])]
    for case, (what, bar) in BARS.items():
        if case in found:
            lines.append(row([what, f"{found[case]['figure']:.3g}", f"{bar:g}"]))
    transfer = found.get("transfer")
    if transfer is not None:
        for key, what in (
            ("beside_synced", "the same, beside `cp` + `sync` + `sha256sum` once"),
            ("push_s", "seconds of a push of 100 MB"),
            ("pull_s", "seconds of a pull of 100 MB"),
            ("synced_s", "seconds of `cp`, `sync`, `sha256sum` of the same bytes"),
            ("plain_s", "seconds of `cp`, `sha256sum`, left to the system's memory"),
        ):
            lines.append(row([what, f"{transfer[key]:.3g}", ""]))
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    made = records[0]
    return "\n".join(
        [
            f"{made['date']}, {made['machine']['cpu']} ({made['machine']['cores']} cores), commit "
            f"`{made['commit'][:12]}`{' with local changes' if made['modified'] else ''}; medians of "
            f"{made['setup']['repeats']}, each in a new process. Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
