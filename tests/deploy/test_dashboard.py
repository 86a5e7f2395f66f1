"""The Grafana dashboard, without a Grafana."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.deploy.files import DASHBOARD, panel_expressions, panels, run, selectors, tool

if TYPE_CHECKING:
    from pathlib import Path


def test_every_expression_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, (_, expression) in enumerate(panel_expressions())
    ]
    generated = tmp_path / "rules.yml"
    generated.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run(tool("promtool"), "check", "rules", generated).stdout


def test_panels_say_what_they_show() -> None:
    assert not [panel["title"] for panel in panels() if not panel["description"]]


def test_panels_do_not_overlap() -> None:
    everything = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        taken = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= taken


def test_panels_read_the_chosen_source_and_servers() -> None:
    for panel in panels():
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            for name, labels in selectors(target["expr"]):
                assert labels.get("instance") == "$instance", f"{panel['title']}: {name}"
                assert labels.get("job") == "lorary", f"{panel['title']}: {name}"


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ('sum by (le) (rate(a_bucket{x="1", y=~".*"}[5m]))', [("a_bucket", {"x": "1", "y": ".*"})]),
        ("a / on (i) group_left b", [("a", {}), ("b", {})]),
        ('absent(up{job="l"} == 1)', [("up", {"job": "l"})]),
        ("a:b:ratio5m > 14.4 * 0.001 and a:b > 5", [("a:b:ratio5m", {}), ("a:b", {})]),
        ("topk(10, sum by (k) (increase(c_total[1h])))", [("c_total", {})]),
    ],
)
def test_selectors_finds_every_series(
    expression: str, wanted: list[tuple[str, dict[str, str]]]
) -> None:
    assert selectors(expression) == wanted
