"""How verify-trainer reads its figures: whole, made short, and where nothing was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import report
from benchmarks.harness.machine import ROOT
from benchmarks.training_run import RECIPES
from lorary.trainer.methods.rules import RULES
from scripts.proven import Proof, junit_options, read_proofs
from scripts.trainer_figures import (
    TABLES,
    fault_figures,
    memory_figures,
    report_figures,
    resumed_figures,
    search_figures,
    served_figures,
    shown_figures,
    speed_figures,
)
from scripts.trainer_run import TESTS, other_tests

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from scripts.verify_figures import Figure


def record(recipe: str, contender: str, **more: Any) -> dict[str, Any]:
    figures = {
        "tokens_per_s": 100.0,
        "first_step_s": 8.0,
        "peak_memory_bytes": 1,
        "load": {"foreign_cores": 0.0},
    }
    return {"recipe": recipe, "contender": contender, "accepted": True, **figures, **more}


def test_training_is_held_to_the_plain_loop_and_to_a_quick_start(tmp_path: Path) -> None:
    def states(**ours: Any) -> list[bool | None]:
        path = tmp_path / "training.jsonl"
        records = [
            one
            for recipe in RECIPES
            for one in (record(recipe, "lorary", **ours), record(recipe, "plain"))
        ]
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        return [figure.is_ok for figure in speed_figures(path)]

    assert states(tokens_per_s=150.0) == [True, True] * len(RECIPES)
    assert states(tokens_per_s=149.0) == [False, True] * len(RECIPES)
    assert states(tokens_per_s=150.0, first_step_s=20.5) == [True, False] * len(RECIPES)
    assert states(accepted=False) == [False] * len(RECIPES)
    assert [f.is_ok for f in speed_figures(tmp_path / "none")] == [False] * len(RECIPES)


def test_a_table_without_rows_or_records_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.jsonl").write_text("")
    written = ""
    for module in ("training_run", "methods_run", "kinds_run"):
        monkeypatch.setattr(f"benchmarks.{module}.section", lambda path: path.read_text() + written)

    def states(rows: int, records: str = "a.jsonl") -> list[bool | None]:
        nonlocal written
        written = f"Records: `benchmarks/results/{records}`.\n\n| a |\n| --- |" + "\n| 1 |" * rows
        text = "\n".join(f"\n{written}\n".join(report.markers(name)) for name in TABLES)
        (tmp_path / "docs" / "benchmarks.md").write_text(text)
        return [figure.is_ok for figure in shown_figures(tmp_path)]

    assert states(100) == [True] * 2 * len(TABLES)
    assert states(7)[0::2] == [rows <= 7 for rows in TABLES.values()]
    assert states(0)[0::2] == [False] * len(TABLES)
    assert states(100, "b.jsonl")[1::2] == [False] * len(TABLES)
    (tmp_path / "benchmarks" / "results" / "a.jsonl").write_text("other figures")
    assert states(100)[1::2] == [False] * len(TABLES)
    not_measured = "\nNot measured yet.\n".join(report.markers("kinds"))
    (tmp_path / "docs" / "benchmarks.md").write_text(not_measured)
    assert not any(figure.is_ok for figure in shown_figures(tmp_path))


def proof(name: str, *recorded: tuple[str, object], has_passed: bool = True) -> Proof:
    pairs = tuple((key, str(value)) for key, value in recorded)
    return Proof(name=name, has_passed=has_passed, recorded=pairs)


def test_figures_are_read_from_the_tests_that_passed() -> None:
    def states(read: Callable[[list[Proof]], list[Figure]], *proofs: Proof) -> list[bool | None]:
        return [figure.is_ok for figure in read([*proofs])]

    over = [(f"difference over {q}", 1e-4) for q in ("none", "nf4", "int8")]
    served = [proof(f"test_t8[{m}]", ("served", m), *over) for m in RULES]
    assert states(served_figures, *served) == [True] * 4
    assert states(served_figures, *served[1:]) == [False, True, True, True]
    far = proof("test_t8[x]", ("difference over none", 1e-2))
    assert states(served_figures, *served, far) == [True, False, True, True]
    assert states(served_figures) == [False] * 4

    killed = "test_killed_and_resumed_is_the_unbroken_run"
    runs = [proof(f"{killed}[{i}]") for i in range(6)]
    assert states(resumed_figures, *runs) == [True]
    assert states(resumed_figures, *runs[1:]) == [False]
    assert states(resumed_figures, *runs, proof(f"{killed}[x]", has_passed=False)) == [False]

    trials, page = proof("a", ("trials", 12), ("pruned", 1)), ("drawings", 4)
    assert states(search_figures, trials, proof("b", page, ("console", 0))) == [True] * 4
    assert states(search_figures, trials, proof("b", page, ("console", 1))) == [*[True] * 3, False]
    assert states(search_figures, proof("a", ("trials", 12), ("pruned", 0))) == [True, *[False] * 3]
    skipped = proof("a", ("pictures", 9), ("console", 0), has_passed=False)
    assert states(report_figures, skipped) == [False, False]

    faults = [proof("test_t1_t3_x[a]"), *(proof(f"test_t{i}_x") for i in (2, 4, 5, 6, 7))]
    assert states(fault_figures, *faults) == [True]
    assert states(fault_figures, *faults, proof("test_t1_t3_x[b]", has_passed=False)) == [False]


def test_memory_is_read_from_a_dry_run() -> None:
    def state(peak: int) -> bool | None:
        rehearsal = {"peak_memory_bytes": peak, "expected_memory_bytes": 1000}
        printed = json.dumps({"forecast": {"rehearsal": rehearsal}}, indent=2)
        return memory_figures(f"a note\n{printed}\n")[0].is_ok

    assert state(1100)
    assert state(1111) is False
    assert memory_figures("error: out of memory")[0].is_ok is False


def test_what_a_test_recorded_is_read_from_pytests_own_file(tmp_path: Path) -> None:
    tests = """
def test_good(record_property): record_property("trials", 12)
def test_bad(record_property):
    record_property("trials", 13)
    assert False
"""
    (tmp_path / "test_it.py").write_text(tests)
    # As the suite runs: a warning is an error.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    command += ["-W", "error", *junit_options(tmp_path / "out.xml"), "."]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    good, bad = read_proofs(tmp_path / "out.xml")
    assert good == proof("test_good", ("trials", 12))
    assert (bad.name, bad.has_passed) == ("test_bad", False)
    assert read_proofs(tmp_path / "none.xml") == []


def test_every_test_of_the_trainer_is_in_one_part() -> None:
    named = [file for files in TESTS.values() for file in files]
    assert len(set(named)) == len(named)
    assert all((ROOT / file).exists() for file in named)
    rest = other_tests()
    assert "tests/trainer/test_fast_lora.py" in rest
    assert not set(rest) & {*named, "tests/trainer/methods/test_rules.py"}
