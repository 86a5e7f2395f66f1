"""The lifecycle benchmark: its traffic over a real engine, and how verify-lifecycle reads its records."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.library import Member, adapter_bytes, fill
from benchmarks.lifecycle_known import TEMPLATE, make, measure
from benchmarks.lifecycle_parts import COLD_TOKENS, DISK, HOST, HOT_TOKENS, WARM, LifecycleEngine
from benchmarks.lifecycle_run import medians, table_of
from benchmarks.workload import Call
from lorary.bases import find_base
from lorary.registry import Registry
from lorary.server.engine.assemble import EngineLimits
from scripts.lifecycle_figures import lifecycle_figures

if TYPE_CHECKING:
    from pathlib import Path

NAMES = tuple(f"life-{k}" for k in range(6))


def test_hot_streams_go_on_while_cold_ones_come_through_the_tiers(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = find_base(tiny_base)
    registry = Registry.open(tmp_path / "store", create=True)
    fill(registry, base, [Member(name, 8, k) for k, name in enumerate(NAMES)], tmp_path / "one")
    size = 2 * adapter_bytes(base, 8)
    limits = EngineLimits(
        max_batch=4,
        max_context=128,
        adapter_memory_bytes=3 * size,
        host_adapter_memory_bytes=3 * size,
    )
    engine = LifecycleEngine(base, registry, dtype=torch.float32, limits=limits)
    source = random.Random(1)
    calls = [
        Call(prompt_ids=tuple(source.randrange(3, 118) for _ in range(9)), adapter=name)
        for name in NAMES
    ]
    try:
        hot, cold = engine.hot_and_cold(calls[:2], calls[2:], gap_s=0.005)
        assert len(hot) >= 2
        assert {len(t.token_ids) for t in hot} == {HOT_TOKENS}
        assert [len(t.token_ids) for t in cold] == [COLD_TOKENS] * 4
        assert all(t.token_s == sorted(t.token_s) for t in (*hot, *cold))
        residency = engine._assembled.residency
        digest = registry.resolve(NAMES[0]).digest
        for where, here, copied in ((WARM, True, None), (HOST, False, True), (DISK, False, False)):
            engine.make(NAMES[0], where)
            assert (NAMES[0] in engine.resident) is here
            assert copied in (None, residency.has_copy(digest))
        engine.leave_only(NAMES[1:3])
        assert engine.resident == frozenset(NAMES[1:3])
    finally:
        engine.close()


def test_what_is_known_is_measured_with_digests_of_their_own(
    tiny_base: Path, tmp_path: Path
) -> None:
    base, folder = find_base(tiny_base), tmp_path / "known"
    registry = Registry.open(folder, create=True)
    fill(registry, base, [Member(TEMPLATE, 1, 0)], tmp_path / "one")
    registry.set_alias(TEMPLATE, "prod", 1)
    make(folder, 40)
    again = Registry.open(folder)
    assert len({again.resolve(f"known-{k}@prod").digest for k in range(40)}) == 40
    found = measure(folder, 40)
    assert found["known"] == 40
    assert 0 < found["resolve_us"]["p50"] <= found["resolve_us"]["p99"]


def record(kind: str, case: str, **figures: Any) -> dict[str, Any]:
    setup = {"known": 10_000, "cold": 200}
    return {"kind": kind, "case": case, "accepted": True, "setup": setup, **figures}


def records(**changed: float) -> list[dict[str, Any]]:
    """Records that reach every bar just so, but for what is changed."""
    value = {
        "itl": 119.0,
        "host": 110.0,
        "disk": 150.0,
        "zipf": 80.0,
        "resolve": 19.9,
        "bytes": 99e6,
    } | changed
    return [
        record("arrivals", "still", itl_ms={"p99": 100.0}),
        record("arrivals", "churn", itl_ms={"p99": value["itl"]}),
        record("first token", "warm", first_token_ms={"p50": 100.0}),
        record("first token", "host", first_token_ms={"p50": value["host"]}),
        record("first token", "disk", first_token_ms={"p50": value["disk"]}),
        record("zipf", "still", output_tokens_per_s=100.0),
        record("zipf", "churn", output_tokens_per_s=value["zipf"]),
        record("known", "", added_bytes=value["bytes"], resolve_us={"p50": value["resolve"]}),
    ]


def write(path: Path, kept: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in kept))
    return path


@pytest.mark.parametrize(
    ("changed", "num_short"),
    [
        ({}, 0),
        ({"itl": 120.0}, 1),
        ({"host": 110.1}, 1),
        ({"disk": 150.1}, 1),
        ({"zipf": 79.9}, 1),
        ({"resolve": 20.0}, 1),
        ({"bytes": 100e6}, 1),
    ],
)
def test_each_figure_has_its_bar(tmp_path: Path, changed: dict[str, float], num_short: int) -> None:
    figures = lifecycle_figures(write(tmp_path / "r.jsonl", records(**changed)))
    assert len(figures) == 7
    assert sum(f.is_ok is False for f in figures) == num_short


def test_what_was_not_measured_or_of_less_is_short(tmp_path: Path) -> None:
    assert all(f.is_ok is False for f in lifecycle_figures(tmp_path / "absent.jsonl"))
    small = [{**r, "setup": {"known": 100, "cold": 200}} for r in records()]
    figures = lifecycle_figures(write(tmp_path / "r.jsonl", small))
    assert [f.name for f in figures if f.is_ok is False] == ["lifecycle: adapters"]


def test_disturbed_runs_do_not_count_and_the_table_shows_ratios() -> None:
    kept = records()
    kept.append({**kept[1], "itl_ms": {"p99": 900.0}, "accepted": False})
    assert medians(kept)["arrivals", "churn", "itl_ms.p99"] == 119.0
    table = table_of(kept)
    assert "119.0 ms | 100.0 ms | 1.19 |" in table
    assert "99.0 MB" in table
