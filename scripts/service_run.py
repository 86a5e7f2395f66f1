"""The parts of ``verify_service``: what is run, how long it takes, and what is read from it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.harness.machine import ROOT
from scripts.measured import Measured
from scripts.service_figures import (
    FUZZ_INPUTS,
    fuzz_figures,
    service_figures,
    shown_figures,
    soak_figures,
)
from scripts.verify_run import check, console, run_parts, run_tests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scripts.verify_figures import Figure

TESTS = {
    "protocol": (
        "tests/edge/test_status.py",
        "tests/edge/test_generate.py",
        "tests/edge/test_bad_input.py",
        "tests/edge/test_bad_peers.py",
        "tests/edge/test_control.py",
        "tests/edge/test_ending.py",
        "tests/edge/test_edge_docs.py",
        "tests/e2e/test_bad_calls.py",
    ),
    "openai": (
        "tests/edge/test_openai.py",
        "tests/edge/test_openai_fuzz.py",
        "tests/edge/test_description.py",
        "tests/e2e/test_tools.py",
    ),
    "access": ("tests/edge/test_access.py", "tests/edge/test_jwt.py"),
    "life": ("tests/edge/test_serve_process.py", "tests/e2e/test_rollout.py"),
    "client": (
        "tests/client/test_client.py",
        "tests/client/test_affinity.py",
        "tests/client/test_load.py",
        "tests/client/test_lorary_command.py",
    ),
    "metrics": (
        "tests/edge/test_metrics.py",
        "tests/deploy/test_live_scrape.py",
        "tests/deploy/test_dashboard.py",
        "tests/deploy/test_alert_rules.py",
    ),
    "deploy": (
        "tests/deploy/test_compose_file.py",
        "tests/deploy/test_helm_chart.py",
        "tests/deploy/test_images.py",
        "tests/deploy/test_healthcheck.py",
    ),
    "ray": (
        "tests/deploy/test_ray.py",
        "tests/deploy/test_ray_files.py",
        "tests/edge/test_on_ray.py",
    ),
    "console": ("tests/edge/test_console.py", "tests/e2e/test_console.py"),
}
"""Tests that are promises of their own."""
MINUTES = {"check": 2, **dict.fromkeys(TESTS, 1), "fuzz": 5, "service": 15, "soak": 31, "shows": 0}
"""What each part takes on two quiet cores."""


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Run this part; may be repeated. Of {', '.join(MINUTES)}."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what this very commit has measured whole.")
    ] = False,
) -> None:
    """Measure every figure that the service promises, and say which is short."""
    measured = Measured("service", resume=resume)
    parts: dict[str, Callable[[], Sequence[Figure]]] = {
        "check": check,
        **{part: partial(run_tests, part, files) for part, files in TESTS.items()},
        "fuzz": fuzz,
        "service": lambda: measured.part("service", "service.py", [], service_figures),
        "soak": lambda: measured.part("soak", "soak.py", [], soak_figures),
        "shows": lambda: shown_figures(ROOT),
    }
    minutes = sum(m for part, m in MINUTES.items() if not only or part in only)
    console.print(f"about {minutes} minutes on two quiet cores; less than twice that on slow ones")
    run_parts(parts, only or [], "service-figures.json")


def fuzz() -> list[Figure]:
    """Send calls that nobody would make through both doors: many more than in the suite."""
    inputs = [f"LORARY_FUZZ_INPUTS={FUZZ_INPUTS}"]
    return run_tests("fuzz", ["tests/fuzz"], fuzz_figures, variables=inputs)
