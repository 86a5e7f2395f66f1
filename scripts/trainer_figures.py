"""What the trainer promises, and how each promise is read from what a part left behind."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from benchmarks import kinds_run, methods_run, report, training_run
from benchmarks.training_run import BAR_FIRST_STEP_S, BAR_RATIO, CONTENDERS, RECIPES, medians_of
from lorary.trainer.methods.rules import RULES
from scripts.proven import Proof, passed, values
from scripts.verify_figures import Figure, at_least, at_most, not_measured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TABLES = {"training": 2 * len(RECIPES), "methods": 1 + len(RULES), "kinds": 6}
"""Sections of docs/benchmarks.md that are filled from records, and the least rows of each."""
_WRITTEN = {"training": training_run, "methods": methods_run, "kinds": kinds_run}
TOLERANCES = {"none": 2e-4, "nf4": 2e-2, "int8": 0.1}
"""Most that a served log probability may differ from PEFT's, by the base's quantization."""
NUM_FAULTS = 7
"""T1 to T7; T8 is what ``served_figures`` reads."""
NUM_TRIALS = 12
NUM_RESUMED = 6
NUM_PICTURES, NUM_DRAWINGS = 9, 4
MEMORY_RATIO = 1.10


def served_figures(proofs: Sequence[Proof]) -> list[Figure]:
    """Read T8: each method's adapter pushed, pulled, and served with PEFT's logits."""
    served = set(values(proofs, "served"))
    figures = [
        at_least("T8: methods pushed, pulled and served as PEFT computes", len(served), len(RULES))
    ]
    for quantization, most in TOLERANCES.items():
        found = [float(value) for value in values(proofs, f"difference over {quantization}")]
        name = f"served minus PEFT's log probabilities, base {quantization}: largest"
        figures.append(at_most(name, max(found), most) if found else _missing(name, f"{most:g}"))
    return figures


def resumed_figures(proofs: Sequence[Proof]) -> list[Figure]:
    """Read whether killed runs that were resumed are the unbroken one."""
    same, asked = passed(proofs, "test_killed_and_resumed_is_the_unbroken_run")
    name = "killed and resumed runs with the same losses and weights, bit for bit"
    return [at_least(name, same, max(asked, NUM_RESUMED))]


def search_figures(proofs: Sequence[Proof]) -> list[Figure]:
    """Read how many trials a search had and pruned, and what a browser saw of its report."""
    return [
        _recorded(proofs, "trials", "search: trials", NUM_TRIALS),
        _recorded(proofs, "pruned", "search: trials pruned", 1),
        *_page_figures(proofs, "the search's report", "drawings", NUM_DRAWINGS),
    ]


def report_figures(proofs: Sequence[Proof]) -> list[Figure]:
    """Read what a browser saw of a run's report."""
    return _page_figures(proofs, "the run's report", "pictures", NUM_PICTURES)


def fault_figures(proofs: Sequence[Proof]) -> list[Figure]:
    """Count the cases T1 to T7 that a test is named after, all of whose tests passed."""
    cases: dict[str, bool] = {}
    for one in proofs:
        for case in re.findall(r"(?<=_)t(\d)(?=_)", one.name):
            cases[case] = cases.get(case, True) and one.has_passed
    return [at_least("faults T1 to T7 that end as promised", sum(cases.values()), NUM_FAULTS)]


def memory_figures(printed: str) -> list[Figure]:
    """Read what ``lorary train --dry-run --json`` printed on a GPU: its peak beside the arithmetic minimum."""
    name = "qlora on a GPU: peak memory, times what arithmetic says"
    try:
        # Notes for people may stand before it.
        found, _ = json.JSONDecoder().raw_decode(printed, max(0, printed.find("{\n")))
        rehearsal = found["forecast"]["rehearsal"]
    except (ValueError, KeyError):
        return [_missing(name, f"{MEMORY_RATIO:g}")]
    ratio = rehearsal["peak_memory_bytes"] / rehearsal["expected_memory_bytes"]
    return [at_most(name, round(ratio, 3), MEMORY_RATIO)]


def speed_figures(path: Path) -> list[Figure]:
    """Read how fast training is beside the plain loop, and how soon it begins."""
    records = report.read(path) if path.exists() else []
    figures = []
    for recipe in RECIPES:
        ours, plain = (medians_of(records, recipe, name) for name in CONTENDERS)
        if ours is None or plain is None:
            note = "no run on a quiet machine; see .lorary/verify/speeds.log"
            bar = f"at least {BAR_RATIO:g}"
            figures.append(not_measured(f"{recipe}: tokens/s", bar, note))
            continue
        ratio = ours["tokens_per_s"] / plain["tokens_per_s"]
        figures += [
            at_least(f"{recipe}: tokens/s, times the plain loop", round(ratio, 2), BAR_RATIO),
            at_most(
                f"{recipe}: seconds to the first step's end",
                round(ours["first_step_s"], 1),
                BAR_FIRST_STEP_S,
            ),
        ]
    return figures


def shown_figures(root: Path) -> list[Figure]:
    """Check that the docs show every table, with every row, as the records beside it say."""
    text = (root / "docs" / "benchmarks.md").read_text()
    figures = []
    for name, least in TABLES.items():
        begin, end = report.markers(name)
        section = text.partition(begin)[2].partition(end)[0]
        # A title and a rule are two.
        rows = max(0, section.count("\n| ") - 2)
        shown = f"docs/benchmarks.md: '{name}'"
        figures.append(at_least(f"{shown}, rows", rows, least))
        records = re.search(r"`(benchmarks/results/[^`/]+)`", section)
        path = root / records[1] if records else root
        is_theirs = path.is_file() and _WRITTEN[name].section(path) == section.strip()
        found = "the same" if is_theirs else "another, or none"
        figures.append(Figure(f"{shown}, and its records", found, "the same", is_ok=is_theirs))
    return figures


def _page_figures(proofs: Sequence[Proof], page: str, pictures: str, least: int) -> list[Figure]:
    name = f"{page} in Chromium: console messages"
    messages = values(proofs, "console")
    seen = at_most(name, max(map(int, messages)), 0) if messages else _missing(name, "0")
    return [_recorded(proofs, pictures, f"{page} in Chromium: {pictures} seen", least), seen]


def _recorded(proofs: Sequence[Proof], key: str, name: str, least: int) -> Figure:
    found = values(proofs, key)
    return at_least(name, min(map(int, found)), least) if found else _missing(name, f"{least}")


def _missing(name: str, bar: str) -> Figure:
    return not_measured(name, bar, "its test did not pass")
