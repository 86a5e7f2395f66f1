"""The parts of ``verify_registry``: what is run, how long it takes, and what is read from it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.harness.machine import ROOT
from scripts.registry_figures import (
    contract_figures,
    history_figures,
    shown_figures,
    speed_figures,
)
from scripts.verify_figures import counted_figures
from scripts.verify_run import (
    FOLDER,
    check,
    console,
    exit_code,
    pytest_command,
    run,
    run_parts,
    run_tests,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from scripts.verify_figures import Figure

PROCESSES, OPERATIONS, KILLS = 8, 200, 60
TESTS = {
    "loaders": (
        "tests/registry/test_peft_round_trip.py",
        "tests/registry/test_local_hub.py",
        "tests/registry/test_xet_uploads.py",
    ),
    "poison": ("tests/registry/test_poison.py", "tests/registry/test_validate_adapter.py"),
    "faults": ("tests/registry/test_r_cases.py", "tests/registry/test_hub_store.py"),
    "repair": ("tests/registry/test_fsck.py", "tests/registry/test_registry_store.py"),
    "signatures": ("tests/registry/test_signatures.py",),
}
"""Tests that are promises of their own. ``loaders``: `hf download` and PEFT, by revision."""
MINUTES = {
    "check": 2,
    "contract": 2,
    "loaders": 2,
    "poison": 1,
    "faults": 2,
    "repair": 1,
    "signatures": 1,
    "kills": 3,
    "speeds": 3,
    "shows": 1,
}
"""What each part takes on two quiet cores."""


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Run this part; may be repeated. Of {', '.join(MINUTES)}."),
    ] = None,
) -> None:
    """Measure every figure that the registry promises, and say which is short."""
    parts: dict[str, Callable[[], Sequence[Figure]]] = {
        "check": check,
        "contract": contract,
        **{part: partial(run_tests, part, files) for part, files in TESTS.items()},
        "kills": kills,
        "speeds": speeds,
        "shows": shows,
    }
    minutes = sum(m for part, m in MINUTES.items() if not only or part in only)
    console.print(
        f"about {minutes} minutes on two quiet cores, and 20 GB of disk for the 5 GB adapter"
    )
    run_parts(parts, only or [], "registry-figures.json")


def contract() -> list[Figure]:
    """Run the contract's tests in a folder, on a hub by LFS and on a hub by Xet."""
    done = run("contract", pytest_command("-v", "tests/registry/test_contract.py"))
    return [exit_code("contract", done), *contract_figures(_text(done.log))]


def kills() -> list[Figure]:
    """Kill processes at every step of a change, and in the middle of 1600 operations."""
    steps = run(
        "kills",
        pytest_command("-rs", "tests/registry/test_registry_races.py", "tests/registry/test_r_cases.py", "-k",
                "killed or step or concurrent"),
    )  # fmt: skip
    variables = [
        f"LORARY_TEST_PROCESSES={PROCESSES}",
        f"LORARY_TEST_OPERATIONS={OPERATIONS}",
        f"LORARY_TEST_KILLS={KILLS}",
    ]
    history = run(
        "linearizable",
        pytest_command("-s", "tests/registry/test_linearizable.py", variables=variables),
    )
    return [
        exit_code("kills", steps),
        *counted_figures("kills", _text(steps.log), []),
        exit_code("linearizable", history),
        *history_figures(_text(history.log), PROCESSES * OPERATIONS, KILLS),
    ]


def speeds() -> list[Figure]:
    """Run the benchmark."""
    out = FOLDER / "registry.jsonl"
    out.unlink(missing_ok=True)
    python = str(ROOT / ".venv/bin/python")
    done = run("speeds", [python, "benchmarks/registry.py", "--out", str(out)])
    return [exit_code("benchmarks/registry.py", done), *speed_figures(out)]


def shows() -> list[Figure]:
    """Look at what the docs show, and run the recorded session again."""
    done = run("transcript", [str(ROOT / ".venv/bin/python"), "scripts/transcript.py", "--check"])
    return [exit_code("scripts/transcript.py --check", done), *shown_figures(ROOT)]


def _text(log: Path) -> str:
    return log.read_text(errors="replace")
