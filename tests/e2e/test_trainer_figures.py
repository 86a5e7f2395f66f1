"""How verify-trainer reads its figures: whole, made short, and where nothing was measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.training_run import RECIPES
from scripts.trainer_figures import TABLES, shown_figures, speed_figures

if TYPE_CHECKING:
    from pathlib import Path


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


def test_a_table_without_rows_is_short(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    file = tmp_path / "docs" / "benchmarks.md"

    def states(rows: str) -> list[bool | None]:
        parts = [f"{rows}".join(report.markers(name)) for name in TABLES]
        file.write_text("\n".join(parts))
        return [figure.is_ok for figure in shown_figures(tmp_path)]

    assert states("\n| a |\n| --- |\n| 1 |\n") == [True] * len(TABLES)
    assert states("\n| a |\n| --- |\n") == [False] * len(TABLES)
    assert states("\nNot measured yet.\n") == [False] * len(TABLES)
