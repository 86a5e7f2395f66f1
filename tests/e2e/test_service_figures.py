"""The service benchmark's parts on a real server, and how verify-service reads its records."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from benchmarks import service_parts as measured
from benchmarks.harness.machine import head
from benchmarks.harness.server_process import ServerProcess
from benchmarks.soak_run import GROWTH, MINUTES, draw, section
from benchmarks.soak_traffic import Library, Pace, slopes, soak
from lorary.bases import find_base
from lorary.registry import Registry
from scripts import lifecycle_run, registry_run, service_run, trainer_run
from scripts.proven import Proof
from scripts.service_figures import DOORS, fuzz_figures, service_figures, soak_figures

PROMPTS = [[3 + (i * 7 + j) % 90 for j in range(12)] for i in range(8)]


def test_parts_measure_a_real_server(tiny_base: Path, tmp_path: Path) -> None:
    Registry.open(tmp_path / "store", create=True)
    arguments = ["--base", str(tiny_base), "--registry", str(tmp_path / "store"), "--threads", "1"]
    with ServerProcess(arguments, tmp_path / "server") as server:
        address, pid = server.address, int(server.facts["pid"])
        found = measured.streams(address, pid, PROMPTS, 24)
        assert found["tokens"] == 8 * 24
        assert found["service_cpu_us_per_token"] >= 0
        calls = measured.unary(address, PROMPTS, 100)
        assert 0 < calls["beside_engine_ms"]["p50"] < calls["whole_ms"]["p50"]
        assert measured.idle(address, pid, 50)["streams"] == 50
        tasks = [(t / "comm").read_text().strip() for t in Path(f"/proc/{pid}/task").iterdir()]
        assert measured.ENGINE in tasks


def test_an_empty_service_is_measured_like_a_server(tmp_path: Path) -> None:
    with ServerProcess([], tmp_path, module="benchmarks.harness.empty_service") as server:
        calls = measured.unary(server.address, PROMPTS, 100)
    # Its thread computes for a millisecond, which is not gRPC's.
    assert 0 < calls["beside_engine_ms"]["p50"] <= calls["whole_ms"]["p50"] - 1.0


def test_a_soak_goes_through_both_doors_and_publishes(tiny_base: Path, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "store", create=True)
    names = [f"soak-{k}" for k in range(6)]
    library = Library(registry, find_base(tiny_base), names, 8, tmp_path / "one")
    library.fill()
    arguments = ["--base", str(tiny_base), "--registry", str(tmp_path / "store"), "--threads", "1"]
    arguments += ["--http-port", "0", "--alias-poll", "0.1"]
    pace = Pace(minutes=0.05, callers=4, sampled_s=0.2, published_s=0.3)
    with ServerProcess(arguments, tmp_path / "server") as server:
        soaked = soak(server, library, PROMPTS, pace)
        with urllib.request.urlopen(server.metrics_url) as response:
            told = response.read().decode()
    assert soaked["answers"] > 0
    assert soaked["published"] == sum(v.version > 1 for v in registry.list()) > 0
    assert len(soaked["series"]) >= 4
    assert all(sample["tasks"] >= 1 for sample in soaked["series"])
    for method in ("Generate", "Completions"):
        assert f'lorary_requests_total{{code="OK",method="{method}"}}' in told
    setup = {"base": "tiny", "threads": 1, "minutes": 0.05, "callers": 4, "adapters": 6, "rank": 8}
    document = tmp_path / "soak.jsonl"
    _write(document, head("soak", setup) | {"load": {"foreign_cores": 0.0}} | soaked)
    assert "| open files |" in section(document)
    draw(soaked["series"], tmp_path / "soak.svg")
    assert "<svg" in (tmp_path / "soak.svg").read_text()


def test_a_caller_who_fails_ends_the_soak(tiny_base: Path, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "store", create=True)
    library = Library(registry, find_base(tiny_base), ["absent"], 8, tmp_path / "one")
    arguments = ["--base", str(tiny_base), "--registry", str(tmp_path / "store"), "--threads", "1"]
    with (
        ServerProcess([*arguments, "--http-port", "0"], tmp_path / "server") as server,
        pytest.raises(ExceptionGroup, match="unhandled errors") as raised,
    ):
        soak(server, library, PROMPTS, Pace(minutes=10, callers=1))
    assert raised.group_contains(grpc.aio.AioRpcError, match="absent")


def test_what_is_never_given_back_is_seen_and_what_comes_and_goes_is_not() -> None:
    filling = [{"at_s": 5.0 * k, "memory_mb": 100.0 * k, "files": 1.0} for k in range(100)]
    full = [
        # A connection each that is there for a while, more of them late; and 60 MB an hour that stay.
        {"at_s": 500.0 + 5.0 * k, "memory_mb": 9e4 + k / 12, "files": 4.0 + (k % 10 > 8 - k // 40)}
        for k in range(200)
    ]
    # And a moment at which nobody was there.
    full[70]["files"] = 0.0
    grown = slopes(filling + full)
    assert grown["memory_mb"] == pytest.approx(60.0)
    assert grown["files"] == 0.0


def test_what_grows_and_a_soak_too_short_are_short(tmp_path: Path) -> None:
    path = tmp_path / "soak.jsonl"

    def states(minutes: float, **changed: float) -> list[bool | None]:
        grown = {key: most - 0.5 for key, most in GROWTH.items()} | changed
        series = [
            {"at_s": 36.0 * k, **{key: 10 + k * most / 100 for key, most in grown.items()}}
            for k in range(100)
        ]
        record = {"kind": "soak", "accepted": True, "series": series}
        _write(path, {"setup": {"minutes": minutes}, **record})
        return [figure.is_ok for figure in soak_figures(path)]

    assert states(MINUTES) == [True] * 5
    assert states(1.0) == [True] * 4 + [False]
    assert states(MINUTES, tasks=1.5) == [True] * 3 + [False, True]
    assert [f.is_ok for f in soak_figures(tmp_path / "none")] == [False] * 5


def _write(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_every_bar_is_held_and_what_is_less_than_promised_is_short(tmp_path: Path) -> None:
    def states(setup: dict[str, Any] | None = None, **changed: Any) -> list[bool | None]:
        records: list[dict[str, Any]] = [
            {"kind": "round", "door": "gRPC", "tokens_per_s": 100.0, "server_cpu_us_per_token": 1},
            {"kind": "round", "door": "HTTP", "tokens_per_s": 95.0, "server_cpu_us_per_token": 1},
            # With the model on the same cores, which the bars are not for.
            {"kind": "streams", "service_cpu_us_per_token": 99.0},
            {"kind": "unary", "beside_engine_ms": {"p50": 2.0}},
            # Of an empty service.
            {"kind": "unary", "beside_engine_ms": {"p50": 0.1}, "model": "nowhere"},
            {"kind": "streams", "service_cpu_us_per_token": 59.0, "model": "elsewhere"},
            {"kind": "unary", "beside_engine_ms": {"p50": 0.9}, "model": "elsewhere"},
            {"kind": "idle", "added_mb": 30.0},
        ]
        whole = {"many": 256, "idle": 1000}
        path = tmp_path / "service.jsonl"
        common = {"setup": setup or whole, "accepted": True}
        _write(path, *(common | record | changed.get(record["kind"], {}) for record in records))
        return [figure.is_ok for figure in service_figures(path)]

    assert states() == [True] * 6
    assert states(streams={"service_cpu_us_per_token": 61.0}).count(False) == 1
    assert states(unary={"beside_engine_ms": {"p50": 1.1}}).count(False) == 1
    assert states(idle={"added_mb": 101.0}).count(False) == 1
    assert states(idle={"accepted": False}).count(False) == 1
    assert states({"many": 256, "idle": 100}).count(False) == 1
    assert [f.is_ok for f in service_figures(tmp_path / "none")] == [False] * 6


def test_fuzzing_is_short_when_it_was_less_or_found_something() -> None:
    whole = {f"inputs through {door}": 2000 for door in DOORS}

    def states(**changed: object) -> list[bool | None]:
        told = {**whole, "faults": 0, "megabytes more": 1.5, **changed}
        recorded = tuple((name, str(value)) for name, value in told.items() if value is not None)
        return [
            f.is_ok for f in fuzz_figures([Proof(name="x", has_passed=True, recorded=recorded)])
        ]

    assert states() == [True, True, True]
    assert states(faults=1) == [True, False, True]
    assert states(**{"inputs through HTTP": 1000}) == [False, True, True]
    missing = {"inputs through OIP HTTP": None, "inputs through gRPC": 9000}
    assert states(**missing) == [False, True, True]
    assert states(**{"megabytes more": 90}) == [True, True, False]
    assert [f.is_ok for f in fuzz_figures([])] == [False] * 3


@pytest.mark.parametrize("run", [lifecycle_run, registry_run, service_run, trainer_run])
def test_the_tests_that_a_promise_names_are_there(run: Any) -> None:
    """One that has moved would make its ``make verify-...`` short."""
    named = [name for tests in run.TESTS.values() for name in tests if name.startswith("tests/")]
    assert named
    root = Path(__file__).parents[2]
    absent = [name for name in named if not (root / name.partition("::")[0]).exists()]
    assert not absent
