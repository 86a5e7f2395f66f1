"""Requirements are read exactly, and the logs that hold them are, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorary.errors import CorruptArtifact, InvalidRequest, Refused
from lorary.registry.aliases import UNSET, AliasLog, AliasMove
from lorary.registry.marks import Mark, MarkLog
from lorary.registry.requirements import measure, parse_requirement

METRICS = {1: {"accuracy": 0.8, "loss": 2.0}, 6: {"accuracy": 0.9, "loss": 1.0}, 7: {"f1": 0.5}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy>=0.90", ("accuracy", ">=", "", 0.9)),
        (" accuracy >= prod - 0.01 ", ("accuracy", ">=", "prod", -0.01)),
        ("accuracy>prod", ("accuracy", ">", "prod", 0.0)),
        ("loss<@6", ("loss", "<", "@6", 0.0)),
        ("loss<=@6+1e-3", ("loss", "<=", "@6", 0.001)),
        ("rouge-l==prod-eu+0", ("rouge-l", "==", "prod-eu", 0.0)),
        ("rouge-l>=prod-2", ("rouge-l", ">=", "prod", -2.0)),
        ("rouge-l>=prod-2+0", ("rouge-l", ">=", "prod-2", 0.0)),
        ("loss>-1.5e2", ("loss", ">", "", -150.0)),
    ],
)
def test_a_requirement_is_read(text: str, expected: tuple[str, str, str, float]) -> None:
    found = parse_requirement(text)
    assert (found.metric, found.op, found.holder, found.bound) == expected
    assert found.text == text.strip()


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy>", ">0.9", "accuracy=0.9", "accuracy>=0.9%", "accuracy=>1",
     "accuracy>=1e999", "accuracy>=../x", "a>=1;b>=2", "accuracy>=nan", "accuracy>=0x10", "9>1"],
)  # fmt: skip
def test_what_is_no_requirement_is_refused(text: str) -> None:
    if text == "accuracy>=nan":  # an alias may be called so; it points nowhere
        with pytest.raises(Refused, match="points nowhere"):
            measured(text, 6)
        return
    with pytest.raises(InvalidRequest):
        parse_requirement(text)


def measured(text: str, version: int, alias: str = "prod", **state: int) -> tuple[bool, object]:
    figure = measure(
        parse_requirement(text), version, alias=alias, state=state, metrics_of=METRICS.__getitem__
    )
    return figure.is_met, figure.holder


def test_figures_are_compared_with_their_holders() -> None:
    assert measured("accuracy>=0.9", 6) == (True, None)
    assert measured("accuracy>0.9", 6) == (False, None)
    assert measured("accuracy>=prod-0.1", 1, prod=6) == (True, 6)
    assert measured("accuracy>=prod-0.05", 1, prod=6) == (False, 6)
    assert measured("loss<@1", 6) == (True, 1)
    # No figure, here or there, is a refusal; only an alias that points nowhere yet asks for nothing.
    assert measured("accuracy>=0.1", 7) == (False, None)
    assert measured("accuracy>=prod", 6, prod=7) == (False, 7)
    assert measured("accuracy>=prod", 6) == (True, None)
    assert measured("accuracy>=prod", 7) == (False, None)
    with pytest.raises(Refused, match="points nowhere"):
        measured("accuracy>=canary", 6, prod=1)


def test_logs_keep_figures_and_marks_and_refuse_damage(tmp_path: Path) -> None:
    requirement = parse_requirement("accuracy>=prod-0.2")
    state = {"prod": 6}
    figure = measure(requirement, 1, alias="prod", state=state, metrics_of=METRICS.__getitem__)
    move = AliasMove(
        at="2026-01-01T00:00:00Z", actor="ada", alias="prod", from_version=None, to_version=1,
        figures=(figure,), forced=True,
    )  # fmt: skip
    file, lock = tmp_path / "aliases.jsonl", tmp_path / "lock"
    AliasLog(file, lock).append(move, expect=UNSET)
    assert AliasLog(file, lock).moves() == (move,)
    line = json.loads(file.read_text())
    damages: tuple[dict[str, Any], ...] = (
        {"figures": [{}]}, {"figures": {}}, {"forced": 1}, {"more": 1},
        {"figures": [line["figures"][0] | {"value": "x"}]},
    )  # fmt: skip
    for damage in damages:
        file.write_text(json.dumps(line | damage) + "\n")
        with pytest.raises(CorruptArtifact, match="line 1"):
            AliasLog(file, lock).moves()

    marks = tmp_path / "marks.jsonl"
    mark = Mark(at="2026-01-01T00:00:00Z", actor="ada", kind="deprecate", version=1, reason="ü")
    MarkLog(marks, lock).append(mark)
    whole = marks.read_bytes()
    marks.write_bytes(whole + b'{"at": "2026')  # a crash
    assert MarkLog(marks, lock).marks().deprecated == {1: mark}
    MarkLog(marks, lock).append(mark)
    assert marks.read_bytes() == 2 * whole
    damages = ({"kind": "x"}, {"version": None}, {"alias": "prod"}, {"require": "x"}, {"y": 1})
    for damage in damages:
        marks.write_text(json.dumps(json.loads(whole) | damage) + "\n")
        with pytest.raises(CorruptArtifact, match="line 1"):
            MarkLog(marks, lock).marks()
