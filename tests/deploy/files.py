"""The files under deploy/, and what the tests read out of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).parents[2]
DEPLOY = REPO / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/lorary.json"
RAY_SERVE = DEPLOY / "ray/serve.yaml"
RAY_SERVICE = DEPLOY / "ray/rayservice.yaml"
RULES = DEPLOY / "prometheus/rules.yml"
RULES_TEST = DEPLOY / "prometheus/rules_test.yml"
PROMETHEUS_CONFIG = DEPLOY / "prometheus/prometheus.yml"
# Metrics that Prometheus itself makes.
SYNTHETIC = {"up", "ALERTS"}
_KEYWORDS = frozenset(
    ["by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless"]
)


def tool(name: str) -> str:
    """Return the path of a program, or fail with what to do."""
    beside = Path(sys.executable).parent / name
    fetched = REPO / ".tools" / name
    for candidate in (beside, fetched):
        if candidate.is_file():
            return str(candidate)
    found = shutil.which(name)
    if found is None:
        pytest.fail(
            f"{name} is neither on the PATH nor in .tools/. `make test` fetches it on Debian and "
            "Ubuntu; elsewhere install Prometheus, then run this again.",
            pytrace=False,
        )
    return found


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a checker in the repository; its output is in the failure if it finds fault."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels that show data."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def panel_expressions(rate_interval: str = "1m") -> list[tuple[str, str]]:
    """Return (panel's title, PromQL), with Grafana's variables filled in."""
    return [
        (
            panel["title"],
            target["expr"].replace("$__rate_interval", rate_interval).replace("$instance", ".*"),
        )
        for panel in panels()
        for target in panel["targets"]
    ]


def rule_expressions() -> list[tuple[str, str]]:
    """Return (rule's name, PromQL) of every recording and alert rule."""
    return [
        (rule.get("alert") or rule["record"], rule["expr"])
        for group in read_yaml(RULES)["groups"]
        for rule in group["rules"]
    ]


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Return each series that an expression reads, with the label values that it asks for.

    Ranges and the label lists of ``by (…)`` and the like are cut away; of the words that are left,
    those before ``(`` are functions, and the others are series or keywords.
    """
    text = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)|\[[^]]*\]", " ", expression)
    series = re.compile(r"(?<![\w:.])([A-Za-z_:][\w:]*)\b(\{[^}]*\})?(?!\s*\()")
    return [
        (match[1], dict(re.findall(r'(\w+)\s*=~?\s*"([^"]*)"', match[2] or "")))
        for match in series.finditer(text)
        if match[1] not in _KEYWORDS
    ]
