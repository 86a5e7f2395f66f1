"""What the engine promises, and how each promise is read from the benchmarks' records."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.exactness_run import TIE
from benchmarks.mix_run import COMPARED, speeds
from benchmarks.roofline_run import accepted
from benchmarks.step_run import accepted_steps
from scripts.verify_figures import Figure, at_least, at_most, not_measured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.report import Cell, Median

OURS, INT8 = "lorary", "lorary-int8"
MIXING_PEERS = ("peft", "vllm", "llama.cpp", "openvino-int8")
"""Peers that must have been measured with adapters, or "the best peer" says nothing."""
BASE_PEER, BASE_PEER_INT8 = "vllm-base", "openvino-int8"
SHARES = {"known": 0.85, "mixed ranks": 0.90}
STEP_ROWS = 32
OVERHEAD_MS = 1.5
OF_BOUND = 0.50
EXACT = 0.88
SECTIONS = ("serving", "peers", "share", "mixes", "roofline", "step", "exactness")

Found = dict[str, dict[report.Cell, "Median"]]


def matrix_figures(path: Path) -> list[Figure]:
    """Read the cells that have a bar from the serving benchmark's records."""
    found = report.medians(report.read(path)) if path.exists() else {}
    small, wide, one = report.Cell(8, 8), report.Cell(32, 32), report.Cell(1, 1)
    return [
        _against_best(found, wide, 3.0),
        _first_token(found, wide, 0.3),
        _against_best(found, small, 2.5),
        *(_base_only(found, c, (OURS,), BASE_PEER, 1.0) for c in (8, 32)),
        *(_base_only(found, c, (OURS, INT8), BASE_PEER_INT8, 0.8) for c in (8, 32)),
        _against_best(found, one, 0.8),
    ]


def share_figures(path: Path) -> list[Figure]:
    """Read what adapters leave of our own speed, from runs that took the cells in turn."""
    records = report.read(path) if path.exists() else []
    bars = {(32, 32): 0.75, (8, 8): 0.80, (1, 1): 0.80}
    return [_of_base(records, report.Cell(*cell), bar) for cell, bar in bars.items()]


def mix_figures(path: Path) -> list[Figure]:
    """Read what very many adapters and mixed ranks cost."""
    found = speeds(report.read(path)) if path.exists() else {}
    figures = []
    for case, beside in COMPARED:
        name, bar = f"mixes: share of '{beside}' that '{case}' reaches", SHARES[case]
        if case not in found or beside not in found:
            figures.append(not_measured(name, f"at least {bar:g}"))
            continue
        note = f"{found[case]:.0f} and {found[beside]:.0f} tokens/s"
        figures.append(_figure(name, found[case] / found[beside], bar, note))
    return figures


def roofline_figures(path: Path) -> list[Figure]:
    """Read how near steps come to the machine's bounds."""
    records = report.read(path) if path.exists() else []
    steps = [*accepted(records, "decode"), *accepted(records, "prompts")]
    figures = []
    if steps:
        best = {
            kind: max(max(r["peaks"][kind].values()) for r in steps)
            for kind in ("bandwidth", "bf16_peak", "int8_peak")
        }
        figures.append(
            _reported(
                "roofline: this machine",
                f"{best['bandwidth'] / 1e9:.0f} GB/s, {best['bf16_peak'] / 1e9:.0f} GFLOP/s bfloat16, "
                f"{best['int8_peak'] / 1e9:.0f} GOP/s int8",
            )
        )
    decode = {(r["weights"], r["rows"], r["adapters"]): r for r in accepted(records, "decode")}
    for adapters in (0, 1, 8, 32):
        name = f"roofline: decode of {STEP_ROWS} rows with {adapters} adapters, of its bound"
        found = decode.get(("bfloat16", STEP_ROWS, adapters))
        if found is None:
            figures.append(not_measured(name, f"at least {OF_BOUND:g}"))
            continue
        note = (
            f"{found['ms']:.1f} ms, bound {found['bound_ms']:.1f}; {found['of_bandwidth']:.0%} of the "
            f"bandwidth, {found['of_peak']:.0%} of the peak"
        )
        figures.append(_figure(name, found["of_bound"], OF_BOUND, note))
    for (weights, rows, adapters), r in decode.items():
        if (weights, rows) != ("bfloat16", STEP_ROWS):
            name = f"roofline: decode in {weights}, {rows} rows, {adapters} adapters"
            share = f"{r['of_bandwidth']:.0%} of the bandwidth, {r['of_bound']:.0%} of the bound"
            figures.append(_reported(name, share))
    prompts = accepted(records, "prompts")
    if not prompts:
        figures.append(not_measured("roofline: prompts, of the peak", "reported"))
    for r in prompts:
        name = f"roofline: {r['rows']} prompt tokens in {r['weights']}, {r['adapters']} adapters"
        figures.append(_reported(name, f"{r['of_peak']:.0%} of the peak"))
    return figures


def step_figures(path: Path) -> list[Figure]:
    """Read what a step spends outside of the native kernels."""
    found = accepted_steps(report.read(path)) if path.exists() else {}
    name = f"step: milliseconds outside of the native kernels at {STEP_ROWS} rows"
    if STEP_ROWS not in found:
        return [not_measured(name, f"at most {OVERHEAD_MS:g}")]
    return [at_most(name, found[STEP_ROWS]["overhead_ms"], OVERHEAD_MS)]


def exactness_figures(path: Path) -> list[Figure]:
    """Read how the engine's answers equal PEFT's."""
    records = report.read(path) if path.exists() else []
    found = {r["mode"]: r for r in records if r["kind"] == "exactness"}
    figures = []
    name = "exactness: positions before the first difference, bfloat16"
    if "bfloat16" in found:
        figures.append(at_least(name, found["bfloat16"]["share"], EXACT))
    else:
        figures.append(not_measured(name, f"at least {EXACT:g}"))
    name = "exactness: float32 answers that differ without a tie"
    if "float32" in found:
        differences = found["float32"]["differences"]
        wrong = [d for d in differences if not d["is_tie"]]
        gaps = ", ".join(
            f"answer {d['answer']} at {d['position']}: {d['gap']:.2g}" for d in differences
        )
        note = f"{len(differences) - len(wrong)} ties below {TIE:g}" + (
            f" ({gaps})" if gaps else ""
        )
        num_right = found["float32"]["num_answers"] - len(wrong)
        figures.append(
            Figure(name, f"{len(wrong)} of {num_right + len(wrong)}", "0", not wrong, note=note)
        )
    else:
        figures.append(not_measured(name, "0"))
    name = "exactness: positions before the first difference, int8"
    if "int8" in found:
        figures.append(_reported(name, f"{found['int8']['share']:.3f}"))
    else:
        figures.append(not_measured(name, "reported"))
    return figures


def shown_figures(root: Path) -> list[Figure]:
    """Check that the docs show what committed records say."""
    text = (root / "docs" / "benchmarks.md").read_text()
    figures = [section_figure(root, section) for section in SECTIONS]
    begin, end = report.markers("peers")
    shown = text.partition(begin)[2].partition(end)[0]
    absent = [name for name in (OURS, *MIXING_PEERS, BASE_PEER) if name not in shown]
    figures.append(
        Figure("docs/benchmarks.md: peers in the table", _all_but(absent), "all", is_ok=not absent)
    )
    picture = root / "docs" / "peers.svg"
    drawn = picture.read_text() if picture.exists() else ""
    absent = [name for name in (OURS, *MIXING_PEERS) if name not in drawn]
    figures.append(
        Figure("docs/peers.svg: lines in the picture", _all_but(absent), "all", is_ok=not absent)
    )
    log = root / "docs" / "log.md"
    days = len(re.findall(r"^## \d{4}-", log.read_text(), re.MULTILINE)) if log.exists() else 0
    figures.append(at_least("docs/log.md: experiments told, those that did not pay, too", days, 1))
    return figures


def section_figure(root: Path, section: str) -> Figure:
    """Check that a section of docs/benchmarks.md is a table from committed records."""
    text = (root / "docs" / "benchmarks.md").read_text()
    begin, end = report.markers(section)
    shown = text.partition(begin)[2].partition(end)[0]
    files = re.findall(r"benchmarks/results/[\w.-]+\.jsonl", shown)
    kept = [file for file in files if _is_committed(root, file)]
    name = f"docs/benchmarks.md: '{section}' is a table from committed records"
    is_there = bool(files) and kept == files and "| ---" in shown
    return Figure(name, ", ".join(kept) or "none", "there", is_ok=is_there)


def _against_best(found: Found, cell: Cell, bar: float) -> Figure:
    name = f"{_place(cell)}: times the best peer's tokens/s"
    best, absent = _best_peer(found, cell)
    ours = found.get(OURS, {}).get(cell)
    if absent or best is None or ours is None:
        return not_measured(name, f"at least {bar:g}", _absent(absent, ours))
    theirs = found[best][cell].tokens_per_s
    note = f"{ours.tokens_per_s:.0f} and {theirs:.0f} tokens/s, {best}"
    return _figure(name, ours.tokens_per_s / theirs, bar, note)


def _first_token(found: Found, cell: Cell, bar: float) -> Figure:
    name = f"{_place(cell)}: share of the best peer's median time to the first token"
    best, absent = _best_peer(found, cell)
    ours = found.get(OURS, {}).get(cell)
    if absent or best is None or ours is None:
        return not_measured(name, f"at most {bar:g}", _absent(absent, ours))
    theirs = found[best][cell].ttft["p50"]
    share = ours.ttft["p50"] / theirs
    note = f"{ours.ttft['p50']:.0f} and {theirs:.0f} ms, {best}"
    return Figure(name, f"{share:.3f}", f"at most {bar:g}", is_ok=share <= bar, note=note)


def _of_base(records: Sequence[dict[str, Any]], cell: Cell, bar: float) -> Figure:
    name = f"{_place(cell)}: share of our own speed without adapters"
    share = report.of_base(records, OURS, cell)
    if share is None:
        return not_measured(name, f"at least {bar:g}", _absent([], None))
    ours = report.medians(records)[OURS]
    mine, bare = ours[cell], ours[report.Cell(0, cell.concurrency)]
    note = f"median of {mine.repeats} repeats; {mine.tokens_per_s:.0f} and {bare.tokens_per_s:.0f} tokens/s"
    return _figure(name, share, bar, note)


def _base_only(found: Found, at_once: int, ours: Sequence[str], peer: str, bar: float) -> Figure:
    cell = report.Cell(0, at_once)
    name = f"{_place(cell)}: times {peer}'s tokens/s"
    mine = {o: found[o][cell].tokens_per_s for o in ours if cell in found.get(o, {})}
    theirs = found.get(peer, {}).get(cell)
    if len(mine) != len(ours) or theirs is None:
        absent = [] if theirs else [peer]
        return not_measured(name, f"at least {bar:g}", _absent(absent, mine or None))
    best = max(mine, key=lambda o: mine[o])
    note = f"{best} {mine[best]:.0f}, {peer} {theirs.tokens_per_s:.0f} tokens/s"
    return _figure(name, mine[best] / theirs.tokens_per_s, bar, note)


def _best_peer(found: Found, cell: Cell) -> tuple[str | None, list[str]]:
    """Return the fastest peer in a cell, and those that must be there and are not."""
    speed = {
        name: cells[cell].tokens_per_s
        for name, cells in found.items()
        if not name.startswith(OURS) and cell in cells
    }
    absent = [name for name in MIXING_PEERS if name not in speed]
    return max(speed, key=lambda name: speed[name], default=None), absent


def _absent(absent: Sequence[str], ours: object) -> str:
    missing = [*absent, *([] if ours is not None else [OURS])]
    return f"no accepted run of {', '.join(missing)}" if missing else ""


def _place(cell: Cell) -> str:
    adapters = (
        f"{cell.adapters} adapter{'s' if cell.adapters > 1 else ''}"
        if cell.adapters
        else "base only"
    )
    return f"{adapters}, {cell.concurrency} request{'s' if cell.concurrency > 1 else ''} at once"


def _figure(name: str, value: float, bar: float, note: str) -> Figure:
    return Figure(name, f"{value:.3f}", f"at least {bar:g}", is_ok=value >= bar, note=note)


def _reported(name: str, figure: str) -> Figure:
    return Figure(name, figure, "reported", is_ok=None)


def _all_but(absent: Sequence[str]) -> str:
    return f"all but {', '.join(absent)}" if absent else "all"


def _is_committed(root: Path, file: str) -> bool:
    """Whether git tracks this file, with this content."""
    commands: list[list[str]] = [
        ["git", "-C", str(root), "ls-files", "--error-unmatch", file],
        ["git", "-C", str(root), "diff", "--quiet", "HEAD", "--", file],
    ]
    done: list[Any] = [subprocess.run(c, capture_output=True, check=False) for c in commands]
    return all(d.returncode == 0 for d in done)
