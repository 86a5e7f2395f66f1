"""Runs the parts of a verification one after another and prints their figures; those of ``verify_main``."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from benchmarks.harness.machine import ROOT, commit
from scripts.proven import junit_options, read_proofs
from scripts.verify_figures import (
    Figure,
    bench_figures,
    counted_figures,
    demo_figures,
    document_figures,
    readme_figures,
    suite_figures,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from scripts.proven import Proof

FOLDER = ROOT / ".lorary" / "verify"
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A command that was run: its exit code, how long it took, where its output is."""

    code: int
    seconds: float
    log: Path


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run this part; may be repeated.")] = None,
    reuse_demo: Annotated[
        bool, typer.Option("--reuse-demo", help="Let the demo reuse what it has finished.")
    ] = False,
) -> None:
    """Measure every figure that the project promises, and say which is short."""
    parts: dict[str, Callable[[], list[Figure]]] = {
        "readme": lambda: readme_figures(ROOT) + document_figures(ROOT),
        "check": check,
        "test": test,
        "demo": lambda: demo(reuse=reuse_demo),
        "bench": bench,
    }
    run_parts(parts, only or [], "figures.json")


def run_parts(
    parts: Mapping[str, Callable[[], Sequence[Figure]]], only: Sequence[str], record: str
) -> NoReturn:
    """Run the parts, print a line per figure, keep them in ``FOLDER / record``, and exit.

    Args:
        parts: what measures the figures of each.
        only: the parts to run; all when empty.
        record: name of the JSON file.

    Raises:
        typer.Exit: with 1 when a figure is short, else 0.
        typer.BadParameter: ``only`` names a part that is none.
    """
    unknown = [name for name in only if name not in parts]
    if unknown:
        raise typer.BadParameter(f"part '{unknown[0]}' is unknown; there are {', '.join(parts)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    console.print(f"commit {commit()['commit'][:12]}, load {os.getloadavg()[0]:.1f}")
    figures: list[Figure] = []
    for name, part in parts.items():
        if only and name not in only:
            console.print(f"{name}: not run, by --only")
            continue
        for figure in part():
            figures.append(figure)
            console.print(figure.line())
    counts = {state: sum(f.is_ok is state for f in figures) for state in (True, False, None)}
    kept = {**commit(), "only": list(only), "figures": [asdict(figure) for figure in figures]}
    (FOLDER / record).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    without = f", {counts[None]} without a bar or a device" if counts[None] else ""
    console.print(f"{counts[True]} figures are ok, {counts[False]} short{without}")
    raise typer.Exit(1 if counts[False] else 0)


def check() -> list[Figure]:
    """Run ``make check``."""
    done = run("check", ["make", "check"])
    return [exit_code("make check", done)]


def test() -> list[Figure]:
    """Run ``make test`` and look at its last lines."""
    done = run("test", ["make", "test"])
    figures = [exit_code("make test", done)]
    return figures + suite_figures(done.log.read_text(errors="replace"), done.seconds)


def demo(*, reuse: bool) -> list[Figure]:
    """Run ``make demo`` and read its summary."""
    summary = ROOT / ".lorary" / "demo" / "summary.json"
    summary.unlink(missing_ok=True)
    arguments = [] if reuse else ["DEMO_ARGS=--fresh"]
    done = run("demo", ["make", "demo", *arguments])
    figures = [exit_code("make demo", done)]
    if not summary.exists():
        return [*figures, Figure("demo's summary", "missing", "written", is_ok=False)]
    return figures + demo_figures(json.loads(summary.read_text()))


def bench() -> list[Figure]:
    """Run the one cell of the benchmark that has a bar."""
    out = FOLDER / "serving.jsonl"
    out.unlink(missing_ok=True)
    arguments = f"--adapters 8 --concurrency 8 --repeats 3 --out {out}"
    done = run("bench", ["make", "bench", f"BENCH_ARGS={arguments}"])
    return [exit_code("make bench", done), *bench_figures(out)]


def run(name: str, command: Sequence[str]) -> Finished:
    """Run a command with its output in a log; show the log's last line while it runs."""
    log = FOLDER / f"{name}.log"
    started = time.monotonic()
    console.print(f"running {' '.join(command)}; its output: {log.relative_to(ROOT)}", style="dim")
    with log.open("wb") as file, console.status(name) as status:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                time.sleep(1.0)
                status.update(f"{name}, {time.monotonic() - started:.0f} s: {_last_line(log)}")
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return Finished(code=process.returncode, seconds=time.monotonic() - started, log=log)


def pytest_command(*words: str, variables: Sequence[str] = ()) -> list[str]:
    """Return the command that runs pytest of this checkout, on one thread; with ``NAME=value``."""
    return [
        "env",
        "OMP_NUM_THREADS=1",
        *variables,
        str(ROOT / ".venv/bin/python"),
        "-m",
        "pytest",
        *words,
    ]


def run_tests(
    part: str,
    files: Sequence[str],
    read: Callable[[Sequence[Proof]], Sequence[Figure]] | None = None,
    *,
    variables: Sequence[str] = (),
) -> list[Figure]:
    """Run the tests of one part; files that are missing make it short.

    Args:
        part: its name.
        files: files and folders of tests.
        read: gives the figures that these tests measure, beside how many passed.
        variables: of their environment, ``NAME=value``.
    """
    missing = [file for file in files if not (ROOT / file).exists()]
    there = [file for file in files if file not in missing]
    proofs = FOLDER / f"{part}.xml"
    proofs.unlink(missing_ok=True)
    done = run(part, pytest_command("-rs", *junit_options(proofs), *there, variables=variables))
    log = done.log.read_text(errors="replace")
    figures = [exit_code(part, done), *counted_figures(part, log, missing)]
    return figures if read is None else [*figures, *read(read_proofs(proofs))]


def exit_code(name: str, done: Finished) -> Figure:
    """Return whether a command ended well; where its output is, if not."""
    note = "" if done.code == 0 else f"see {done.log.relative_to(ROOT)}"
    return Figure(f"{name}: exit code", str(done.code), "0", is_ok=done.code == 0, note=note)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = file.read().decode(errors="replace").split("\n")
    shown = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return shown[-80:].replace("[", "\\[")
