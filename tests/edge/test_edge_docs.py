"""The docs name every flag, metric, error and call, and nothing that does not exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lorary import errors
from lorary.client import Client, SamplingOptions
from lorary.errors import OUTCOMES
from lorary.server.config import options_table

if TYPE_CHECKING:
    from tests.edge.fakes import Edge

DOCS = Path(__file__).parents[2] / "docs"


def read(name: str) -> str:
    return (DOCS / name).read_text()


def test_the_table_of_options_is_the_configurations() -> None:
    assert options_table() in read("operations.md"), (
        "docs/operations.md is out of date; its table of options is options_table() of "
        "lorary.server.config"
    )


async def test_every_metric_is_documented_and_every_documented_one_exists(edge: Edge) -> None:
    families = {metric.name: metric.type for metric in edge.metrics.registry.collect()}
    real = {
        name + {"counter": "_total", "info": "_info"}.get(kind, "")
        for name, kind in families.items()
        if name.startswith("lorary_")
    }
    documented = set(re.findall(r"^\| `(lorary_\w+)`", read("operations.md"), re.MULTILINE))
    assert documented == real


def test_every_error_is_documented_with_its_status_and_exit_code() -> None:
    text = read("errors.md")
    for cls, outcome in OUTCOMES.items():
        row = f"| `{cls.__name__}` | `{outcome.grpc_status}` | {outcome.exit_code} |"
        assert row in text, row
    for name in re.findall(r"^\| `(\w+)` \| `[A-Z_]+` \|", text, re.MULTILINE):
        assert hasattr(errors, name), name


def test_every_status_over_http_is_documented() -> None:
    rows = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| (\d+)", read("openai.md"), re.MULTILINE)
    documented = {name: int(code) for names, code in rows for name in re.findall(r"\w+", names)}
    # Nobody is left to read what became of a call that was cancelled.
    real = {o.grpc_status: o.http_status for o in OUTCOMES.values() if o.grpc_status != "CANCELLED"}
    assert documented == real


def test_every_call_and_option_of_the_client_is_documented() -> None:
    text = read("client.md")
    calls = [n for n, m in vars(Client).items() if inspect.isfunction(m) and n[0] != "_"]
    assert all(f"`{name}(" in text for name in calls if name != "close")
    assert all(f"`{name}`" in text for name in SamplingOptions.__annotations__)
