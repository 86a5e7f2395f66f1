"""The service benchmark's parts on a real server, and how verify-service reads its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import service_parts as measured
from benchmarks.harness.server_process import ServerProcess
from benchmarks.library import Member, fill
from benchmarks.service_run import BAR_GROWTH
from lorary.bases import find_base
from lorary.registry import Registry
from scripts.proven import Proof
from scripts.service_figures import DOORS, fuzz_figures, service_figures


def test_parts_measure_a_real_server(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "_SAMPLED_EVERY_S", 0.2)
    registry = Registry.open(tmp_path / "store", create=True)
    names = [f"soak-{k}" for k in range(6)]
    members = [Member(name, 8, k) for k, name in enumerate(names)]
    fill(registry, find_base(tiny_base), members, tmp_path / "one")
    arguments = ["--base", str(tiny_base), "--registry", str(tmp_path / "store"), "--threads", "1"]
    prompts = [[3 + (i * 7 + j) % 90 for j in range(12)] for i in range(8)]
    with ServerProcess(arguments, tmp_path / "server") as server:
        address, pid = server.address, int(server.facts["pid"])
        found = measured.streams(address, pid, prompts, 24)
        assert found["tokens"] == 8 * 24
        assert found["service_cpu_us_per_token"] >= 0
        calls = measured.unary(address, prompts, 100)
        assert 0 < calls["beside_engine_ms"]["p50"] < calls["whole_ms"]["p50"]
        assert measured.idle(address, pid, 50)["streams"] == 50
        churned = measured.soak(address, pid, prompts, names, minutes=0.04, concurrency=3)
        assert churned["answers"] > 0
        assert len(churned["series"]) >= 4
        tasks = [(t / "comm").read_text().strip() for t in Path(f"/proc/{pid}/task").iterdir()]
        assert measured.ENGINE in tasks


def test_a_straight_line_goes_through_the_last_two_thirds() -> None:
    warming = [{"at_s": 60.0 * k, "memory_mb": 100.0 * k, "threads": 4.0} for k in range(10)]
    flat = [{"at_s": 600.0 + 60.0 * k, "memory_mb": 900.0 + k, "threads": 4.0} for k in range(20)]
    assert measured.slopes(warming + flat) == {"memory_mb": 60.0, "threads": 0.0}


def test_every_bar_is_held_and_what_is_less_than_promised_is_short(tmp_path: Path) -> None:
    grown = {key: most - 0.5 for key, most in BAR_GROWTH.items()}

    def states(setup: dict[str, Any] | None = None, **changed: Any) -> list[bool | None]:
        records: list[dict[str, Any]] = [
            {"kind": "round", "door": "gRPC", "tokens_per_s": 100.0, "server_cpu_us_per_token": 1},
            {"kind": "round", "door": "HTTP", "tokens_per_s": 95.0, "server_cpu_us_per_token": 1},
            # With the model on the same cores, which the bars are not for.
            {"kind": "streams", "service_cpu_us_per_token": 99.0},
            {"kind": "unary", "beside_engine_ms": {"p50": 2.0}},
            {"kind": "streams", "service_cpu_us_per_token": 59.0, "model": "elsewhere"},
            {"kind": "unary", "beside_engine_ms": {"p50": 0.9}, "model": "elsewhere"},
            {"kind": "idle", "added_mb": 30.0},
            {"kind": "soak", "per_hour": grown},
        ]
        whole = {"many": 256, "idle": 1000, "minutes": 30.0}
        path = tmp_path / "service.jsonl"
        path.write_text(
            "".join(
                json.dumps(
                    {
                        "setup": setup or whole,
                        "accepted": True,
                        **record,
                        **changed.get(record["kind"], {}),
                    }
                )
                + "\n"
                for record in records
            )
        )
        return [figure.is_ok for figure in service_figures(path)]

    assert states() == [True] * 10
    assert states(streams={"service_cpu_us_per_token": 61.0}).count(False) == 1
    assert states(unary={"beside_engine_ms": {"p50": 1.1}}).count(False) == 1
    assert states(idle={"added_mb": 101.0}).count(False) == 1
    assert states(soak={"per_hour": {**grown, "memory_mb": 51.0}}).count(False) == 1
    assert states(soak={"accepted": False}).count(False) == 3
    assert states({"many": 256, "idle": 1000, "minutes": 1.0}).count(False) == 1
    assert [f.is_ok for f in service_figures(tmp_path / "none")] == [False] * 10


def test_fuzzing_is_short_when_it_was_less_or_found_something() -> None:
    whole = {f"inputs through {door}": 4000 for door in DOORS}

    def states(**changed: object) -> list[bool | None]:
        told = {**whole, "faults": 0, "megabytes more": 1.5, **changed}
        recorded = tuple((name, str(value)) for name, value in told.items())
        return [
            f.is_ok for f in fuzz_figures([Proof(name="x", has_passed=True, recorded=recorded)])
        ]

    assert states() == [True, True, True]
    assert states(faults=1) == [True, False, True]
    assert states(**{"inputs through HTTP": 1000}) == [False, True, True]
    assert states(**{"megabytes more": 90}) == [True, True, False]
    assert [f.is_ok for f in fuzz_figures([])] == [False] * 3
