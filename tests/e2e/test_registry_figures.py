"""How verify-registry reads its figures: from what pytest and the benchmark write, whole and made short."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.registry_figures import (
    contract_figures,
    history_figures,
    speed_figures,
)
from scripts.verify_figures import counted_figures

CONTRACT = """
tests/registry/test_contract.py::test_push[folder] PASSED [ 25%]
tests/registry/test_contract.py::test_push[hub] PASSED    [ 50%]
tests/registry/test_contract.py::test_push[hub-xet] PASSED [ 75%]
"""


def test_the_contract_must_hold_as_often_in_every_place() -> None:
    assert all(figure.is_ok for figure in contract_figures(CONTRACT))
    for place in ("folder", "hub", "hub-xet"):
        short = CONTRACT.replace(f"[{place}] PASSED", f"[{place}] SKIPPED")
        assert sum(not figure.is_ok for figure in contract_figures(short)) == 1
    assert not any(figure.is_ok for figure in contract_figures(""))


def test_nothing_may_fail_or_be_skipped_or_be_missing() -> None:
    assert all(figure.is_ok for figure in counted_figures("x", "== 7 passed in 3.0s ==", []))
    for log in ("6 passed, 1 skipped in 3s", "1 failed, 6 passed in 3s", "1 error in 3s", ""):
        assert not all(figure.is_ok for figure in counted_figures("x", log, []))
    assert not counted_figures("x", "7 passed in 3s", ["tests/none.py"])[-1].is_ok


def test_a_history_must_be_long_and_bloody_enough() -> None:
    said = "linearizable: 1600 operations of 8 processes, 60 kills, 196 versions, 475 moves"
    assert all(figure.is_ok for figure in history_figures(said, 1600, 60))
    assert not any(figure.is_ok for figure in history_figures(said, 1601, 61))
    assert not any(figure.is_ok for figure in history_figures("", 1600, 60))


def test_speeds_are_those_of_a_quiet_machine(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    record = {"kind": "list", "figure": 0.4, "accepted": True}
    file.write_text(json.dumps(record) + "\n")
    ok = [figure.name for figure in speed_figures(file) if figure.is_ok]
    assert ok == ["speed: seconds to list 10,000 versions"]
    for bad in ({"figure": 0.6}, {"accepted": False}):
        file.write_text(json.dumps(record | bad) + "\n")
        assert not any(figure.is_ok for figure in speed_figures(file))
    assert not any(figure.is_ok for figure in speed_figures(tmp_path / "none"))
