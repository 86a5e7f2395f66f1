"""Render the Helm chart once for every set of values on standard input; JSON in, JSON out.

A program of its own: Helm's library brings a Go runtime, which wants a process' signals for itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from helm_python.chart import Chart, lint
from helm_python.errors import HelmError

CHART = Path(__file__).parents[2] / "deploy/helm/lorary"


def main() -> None:
    cases: dict[str, dict[str, Any]] = json.load(sys.stdin)
    found: dict[str, Any] = {"lint": lint(str(CHART), strict=True)}
    with Chart.load(CHART) as chart:
        for name, values in cases.items():
            try:
                found[name] = chart.render(values=values, name="demo", namespace="prod")
            except HelmError as error:
                found[name] = str(error)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
