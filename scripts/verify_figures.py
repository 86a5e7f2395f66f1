"""What is promised, and how each promise is read from what a part left behind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MINUTES = 15.0
"""Most minutes of the demo after installs, and of the tests, on two quiet cores."""
MEMORY_GB = 6.0
NUM_REQUESTS = 60
ACCURACY = 0.80
EXACT_GAIN = 0.30
"""How far the bare base's freely generated labels stay below the adapter's: "far"."""
BLEU = 14.0
BASE_BLEU = 4.0
"""The base does not translate: about 1, and never more than this."""
SPEED_UP = 2.0
CELL = report.Cell(8, 8)
MATRIX = {report.Cell(k, c) for k in (0, 1, 8, 32) for c in (1, 8, 32)}
EXAMPLE_LINES = 20
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error|errors)\b")
# A test may only be skipped where the machine lacks what it needs.
SKIP_REASONS = re.compile(r"\bGPU\b|CUDA|NVIDIA|nvidia|this CPU has no")


@dataclass(frozen=True, slots=True)
class Figure:
    """One promise: what was found, what was promised, and whether that is enough.

    ``is_ok`` is None for what has no bar, and for what this machine cannot measure: neither counts as
    ok, nor as short.
    """

    name: str
    figure: str
    bar: str
    is_ok: bool | None
    note: str = ""

    def line(self) -> str:
        """Return the figure's one line."""
        verdict = {True: "[green]ok[/]", False: "[red]short[/]", None: "none"}[self.is_ok]
        return (
            f"{self.name}: {self.figure} (bar: {self.bar}) {verdict}{self.note and '; '}{self.note}"
        )


def readme_figures(root: Path) -> list[Figure]:
    """Check that README has what a newcomer needs."""
    text = (root / "README.md").read_text()
    parts = re.split(r"^## .*$", text, flags=re.MULTILINE)
    what_lines = [line for line in parts[0].split("```")[0].splitlines()[1:] if line.strip()]
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = [e for e in examples if "lorary.client" in e]
    longest = max((len(e.splitlines()) for e in calls), default=0)
    commands = [c for c in ("make demo", "make test") if re.search(rf"^{c}\b", text, re.MULTILINE)]
    has_map = all(f"{name}/" in text for name in ("registry", "trainer", "server", "client"))
    return [
        at_most("README: lines that say what it is", len(what_lines), 5),
        Figure("README: set-up commands", " and ".join(commands) or "none", "make demo and make test",
               is_ok=len(commands) == 2),
        Figure("README: lines of the client example", str(longest), f"1 to {EXAMPLE_LINES}",
               is_ok=0 < longest <= EXAMPLE_LINES),
        _is_there("README: diagram of the flow", "```mermaid" in text),
        _is_there("README: where things are", has_map),
        _is_there(".ci/run: calls make test", "make test" in (root / ".ci/run").read_text()),
    ]  # fmt: skip


def document_figures(root: Path) -> list[Figure]:
    """Check that the benchmark's table is there, with every cell."""
    text = (root / "docs" / "benchmarks.md").read_text()
    begin, end = report.markers("serving")
    section = text.partition(begin)[2].partition(end)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| \d", section, re.MULTILINE)
    found = {report.Cell(int(k), int(c)) for k, c in rows}
    name = "docs/benchmarks.md: cells measured"
    return [at_least(name, len(found & MATRIX), len(MATRIX))]


def suite_figures(log: str, seconds: float) -> list[Figure]:
    """Read pytest's last lines: nothing failed, and nothing was skipped without need."""
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)(?:,| in )", _summary(log))}
    skips = re.findall(r"^SKIPPED \[(\d+)\] (.*)$", log, re.MULTILINE)
    needless = [why for _, why in skips if not SKIP_REASONS.search(why)]
    skipped, unexplained = counts.get("skipped", 0), len(needless)
    return [
        at_least("make test: tests passed", counts.get("passed", 0), 1),
        at_most("make test: minutes", round(seconds / 60, 1), MINUTES),
        Figure("make test: skipped", f"{skipped}, {unexplained} of them without a missing device",
               "0 without", is_ok=unexplained == 0 and sum(int(n) for n, _ in skips) == skipped,
               note="; ".join(needless[:3])),
    ]  # fmt: skip


def demo_figures(summary: dict[str, Any]) -> list[Figure]:
    """Read the demo's summary."""
    tasks = summary["tasks"]
    figures = [
        at_most("demo: minutes after installs", round(summary["seconds_of_all_steps"] / 60, 1),
                 MINUTES),
        _below("demo: peak memory, GB", round(summary["peak_memory_bytes"] / 1e9, 2), MEMORY_GB),
        at_least("demo: requests in flight", summary["concurrency"], NUM_REQUESTS),
        at_least("demo: requests to adapters and base", summary["num_requests"], NUM_REQUESTS),
        at_most("demo: answers from the wrong adapter", summary["num_wrong_receipts"], 0),
        *_mixing(summary["steps_by_distinct_adapters"], len(tasks)),
    ]  # fmt: skip
    for name in ("sentiment", "summarization", "translation"):
        if name not in tasks:
            figures.append(Figure(f"demo: {name}", "missing", "measured", is_ok=False))
            continue
        figures += _task_bars(name, tasks[name])
        figures.append(_within_noise(name, tasks[name]))
    return figures


def bench_figures(path: Path) -> list[Figure]:
    """Read the ratio of the cell that has a bar."""
    name = f"benchmark: times PEFT's speed, {CELL.adapters} adapters, {CELL.concurrency} requests"
    if not path.exists():
        return [not_measured(name, f"≥ {SPEED_UP}")]
    found = report.medians(report.read(path))
    times = report.ratio(found, CELL, "lorary", "peft")
    if times is None:
        note = "no run on a quiet machine; see .lorary/verify/bench.log"
        return [not_measured(name, f"≥ {SPEED_UP}", note)]
    ours = found["lorary"][CELL].tokens_per_s
    theirs = found["peft"][CELL].tokens_per_s
    note = f"{ours:.0f} and {theirs:.0f} tokens/s"
    return [
        Figure(name, f"{times:.2f}", f"at least {SPEED_UP}", is_ok=times >= SPEED_UP, note=note)
    ]


def _task_bars(name: str, task: dict[str, Any]) -> list[Figure]:
    base, adapter, served = task["base"], task["adapter"], task["served"]
    if name == "sentiment":
        gain = round(task["all_adapter"]["exact"] - task["all_base"]["exact"], 3)
        return [
            at_least("sentiment: accuracy, trainer", adapter, ACCURACY),
            at_least("sentiment: accuracy, served", served, ACCURACY),
            at_least("sentiment: free generation, adapter over base", gain, EXACT_GAIN),
        ]
    if name == "translation":
        return [
            at_least("translation: BLEU, trainer", adapter, BLEU),
            at_least("translation: BLEU, served", served, BLEU),
            at_most("translation: BLEU of the base", base, BASE_BLEU),
        ]
    gain, noise = round(served - base, 2), round(task["noise"], 2)
    return [at_least("summarization: ROUGE-L, served over base", gain, noise)]


def _within_noise(name: str, task: dict[str, Any]) -> Figure:
    difference = round(task["served"] - task["adapter"], 4)
    return Figure(
        f"{name}: served minus trainer's {task['metric']}",
        f"{difference:+}",
        f"within ±{task['noise']}",
        is_ok=abs(difference) <= task["noise"],
    )


def _mixing(steps: Sequence[int], num_adapters: int) -> list[Figure]:
    mixed = sum(steps[2:])
    most = max((k for k, count in enumerate(steps) if count), default=0)
    return [
        at_least("demo: steps shared by two adapters or more", mixed, 1),
        at_least("demo: most adapters in one step", most, num_adapters),
    ]


def _summary(log: str) -> str:
    """Return pytest's last line of counts."""
    lines = re.findall(r"^=*\s?(\d+ \w+.* in [\d.]+s.*)$", log, re.MULTILINE)
    return lines[-1] if lines else ""


def not_measured(name: str, bar: str, note: str = "") -> Figure:
    """Return a figure that has a bar and was not measured."""
    return Figure(name, "not measured", bar, is_ok=False, note=note)


def at_least(name: str, value: float | None, bar: float) -> Figure:
    """Return a figure that has to reach its bar; None was not measured."""
    if value is None:
        return not_measured(name, f"at least {bar:g}")
    return Figure(name, f"{value:g}", f"at least {bar:g}", is_ok=value >= bar)


def at_most(name: str, value: float | None, bar: float) -> Figure:
    """Return a figure that may not be above its bar; None was not measured."""
    if value is None:
        return not_measured(name, f"at most {bar:g}")
    return Figure(name, f"{value:g}", f"at most {bar:g}", is_ok=value <= bar)


def _below(name: str, value: float, bar: float) -> Figure:
    return Figure(name, f"{value:g}", f"below {bar:g}", is_ok=value < bar)


def _is_there(name: str, found: bool) -> Figure:
    return Figure(name, "there" if found else "missing", "there", is_ok=found)


def counted_figures(part: str, log: str, missing: Sequence[str]) -> list[Figure]:
    """Read pytest's counts: all passed, none skipped, no file missing."""
    lines = [line for line in log.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    counts = {what: int(n) for n, what in _COUNTS.findall(lines[-1])} if lines else {}
    others = sum(count for what, count in counts.items() if what != "passed")
    figures = [
        at_least(f"{part}: tests passed", counts.get("passed", 0), 1),
        at_most(f"{part}: tests failed or skipped", others, 0),
    ]
    if missing:
        figures.append(
            Figure(f"{part}: files of tests", f"{missing[0]} is missing", "all", is_ok=False)
        )
    return figures
