"""How verify-engine reads its figures: from records of real runs, as they are and made short.

``engine_records.jsonl`` holds what ``step``, ``roofline``, ``mixes`` and ``exactness`` wrote in short
runs on a busy machine: their form is what counts here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import exactness_run, mix_run, report, roofline_run, step_run
from benchmarks.mix_cases import KNOWN, MEAN_RANK, NUM_FITTING, NUM_RESIDENT, cases, members
from benchmarks.plan import Plan, Popularity
from benchmarks.roofline_model import Machine, Shape, bound_s, compute_s, memory_s, work
from scripts.engine_figures import (
    MIXING_PEERS,
    exactness_figures,
    matrix_figures,
    mix_figures,
    roofline_figures,
    share_figures,
    step_figures,
)
from tests.e2e.test_measuring import run_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.workload import Call
    from scripts.verify_figures import Figure

RECORDS = Path(__file__).with_name("engine_records.jsonl")


def records(benchmark: str) -> list[dict[str, Any]]:
    return [r for r in report.read(RECORDS) if r["benchmark"] == benchmark]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def write(kept: list[dict[str, Any]]) -> Path:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        return path

    return write


def named(figures: list[Figure], text: str) -> Figure:
    (found,) = [f for f in figures if text in f.name]
    return found


def test_nothing_measured_is_short(tmp_path: Path) -> None:
    for read in (
        matrix_figures,
        share_figures,
        mix_figures,
        roofline_figures,
        step_figures,
        exactness_figures,
    ):
        figures = read(tmp_path / "absent.jsonl")
        assert figures
        assert all(f.is_ok is False for f in figures), read


@pytest.mark.parametrize(("overhead_ms", "is_ok"), [(1.5, True), (1.6, False)])
def test_step(
    written: Callable[[list[dict[str, Any]]], Path], overhead_ms: float, is_ok: bool
) -> None:
    (record,) = records("step")
    assert sum(record["parts_ms"].values()) > record["overhead_ms"] > 0
    (figure,) = step_figures(written([{**record, "overhead_ms": overhead_ms}]))
    assert figure.is_ok is is_ok
    (figure,) = step_figures(written([{**record, "overhead_ms": 0.1, "accepted": False}]))
    assert figure.is_ok is False
    assert "| sampling | 1.50 |" in step_run.table_of([record])


@pytest.mark.parametrize(("share", "is_ok"), [(0.5, True), (0.49, False)])
def test_roofline(
    written: Callable[[list[dict[str, Any]]], Path], share: float, is_ok: bool
) -> None:
    kept = [
        {**r, "of_bound": share} if (r["kind"], r.get("rows")) == ("decode", 32) else r
        for r in records("roofline")
    ]
    figures = roofline_figures(written(kept))
    bars = [f for f in figures if f.is_ok is not None]
    assert [f.is_ok for f in bars] == [is_ok] * 4
    assert named(figures, "this machine").is_ok is None
    assert named(figures, "512 prompt tokens in bfloat16, 4").figure == "54% of the peak"
    assert "| decode | bfloat16 | 32 | 32 |" in roofline_run.tables_of(kept)


def test_mixes(written: Callable[[list[dict[str, Any]]], Path]) -> None:
    speeds = {"known": 84.0, "resident": 100.0, "mixed ranks": 90.0, "one rank": 100.0}
    kept = [{**r, "output_tokens_per_s": speeds[r["case"]]} for r in records("mixes")]
    known, mixed = mix_figures(written(kept))
    assert (known.figure, known.is_ok) == ("0.840", False)
    assert (mixed.figure, mixed.is_ok) == ("0.900", True)
    assert "| known | 84 | resident | 84% |" in mix_run.table_of(kept)
    known, _ = mix_figures(written([r for r in kept if r["case"] != "resident"]))
    assert known.is_ok is False


def test_exactness(written: Callable[[list[dict[str, Any]]], Path]) -> None:
    found = {r["mode"]: r for r in records("exactness")}
    tie = {"answer": 3, "adapter": None, "position": 5, "gap": 3e-5, "is_tie": True}
    half, exact, rounded = exactness_figures(
        written([found["int8"], {**found["float32"], "differences": [tie]}, found["bfloat16"]])
    )
    assert half.is_ok is True
    assert (exact.figure, exact.is_ok) == ("0 of 6", True)
    assert "answer 3 at 5: 3e-05" in exact.note
    assert (rounded.figure, rounded.is_ok) == ("0.896", None)
    wrong = {**tie, "gap": 0.2, "is_tie": False}
    half, exact, _ = exactness_figures(
        written(
            [
                {**found["float32"], "differences": [tie, wrong]},
                {**found["bfloat16"], "share": 0.87},
            ]
        )
    )
    assert half.is_ok is False
    assert (exact.figure, exact.is_ok) == ("1 of 6", False)
    assert "| int8 | 89.6% | 4 of 6 | 0 of 2 | 0.13 |" in exactness_run.table_of([*found.values()])


def test_a_tie_is_what_the_oracle_itself_cannot_tell_apart() -> None:
    calls: list[Any] = [None, None, None]

    class Named:
        adapter = "a"

    calls = [Named()] * 3
    wanted = [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    found = [[1, 2, 3], [1, 0, 3], [1, 2, 0]]

    def logits(_call: Call, _answer: object) -> list[list[float]]:
        return [[0.0] * 4, [1.0, 0, 1.00005, 0], [1.0, 0, 0, 2.0]]

    made = exactness_run.compare(calls, wanted, found, logits)
    assert (made["share"], made["whole_answers"], made["num_ties"]) == (round(6 / 9, 4), 1, 1)
    assert [d["gap"] for d in made["differences"]] == [5e-5, 1.0]


def plan_of(**changes: Any) -> Plan:
    """Return what a serving benchmark does, in the least."""
    values: dict[str, Any] = {
        "base": "tiny",
        "dtype": "bfloat16",
        "threads": 1,
        "adapters": (8, 0),
        "concurrency": (8, 8),
        "contenders": ("lorary",),
        "popularity": Popularity.uniform,
        "prompt_tokens": 4,
        "new_tokens": 4,
        "min_requests": 1,
        "agreement_calls": 1,
    }
    return Plan(**{**values, **changes})


def matrix(ours: dict[tuple[int, int], float]) -> list[dict[str, Any]]:
    """Everybody in every cell with a bar: peers at 100 tokens/s, the base peers among them."""
    made = []
    for adapters, at_once in ((32, 32), (8, 8), (0, 8), (0, 32), (0, 1), (1, 1)):
        speeds = dict.fromkeys(MIXING_PEERS, 100.0)
        if not adapters:
            speeds["vllm-base"] = 100.0
        speeds |= dict.fromkeys(("lorary", "lorary-int8"), ours[adapters, at_once])
        for name, speed in speeds.items():
            record = run_record(name, speed)
            slow = 10.0 if name in MIXING_PEERS else 3.0
            ttft = {"p50": slow, "p95": slow, "p99": slow}
            place = {"adapters": adapters, "concurrency": at_once}
            made.append({**record, **place, "ttft_ms": ttft})
    return made


OURS = {(32, 32): 300.0, (8, 8): 250.0, (0, 8): 300.0, (0, 32): 400.0, (0, 1): 100.0, (1, 1): 80.0}


def test_matrix_at_its_bars(written: Callable[[list[dict[str, Any]]], Path]) -> None:
    figures = matrix_figures(written(matrix(OURS)))
    assert len(figures) == 8
    assert [f.name for f in figures if not f.is_ok] == []


def test_shares_at_and_below_their_bars(
    written: Callable[[list[dict[str, Any]]], Path],
) -> None:
    def shares(ours: dict[tuple[int, int], float]) -> list[tuple[str, bool | None]]:
        kept = [r for r in matrix(ours) if r["contender"] == "lorary"]
        return [(f.figure, f.is_ok) for f in share_figures(written(kept))]

    assert shares(OURS) == [("0.750", True), ("0.833", True), ("0.800", True)]
    below = {**OURS, (32, 32): 299.0, (8, 8): 239.0, (1, 1): 79.0}
    assert shares(below) == [("0.748", False), ("0.797", False), ("0.790", False)]


def test_a_share_is_of_the_same_repeat(
    written: Callable[[list[dict[str, Any]]], Path],
) -> None:
    """A machine that halves its speed between repeats changes no share; what was disturbed has none."""
    kept = []
    for repeat, (bare, mine) in enumerate([(400.0, 320.0), (200.0, 162.0), (500.0, 410.0)]):
        for adapters, speed in ((0, bare), (8, mine)):
            record = {**run_record("lorary", speed), "repeat": repeat, "adapters": adapters}
            kept.append(record)
    kept += [{**run_record("lorary", 500.0), "repeat": 3}]
    kept += [{**run_record("lorary", 1.0, accepted=False), "repeat": 3, "adapters": 0}]
    figure = named(share_figures(written(kept)), "8 adapters")
    assert (figure.figure, figure.is_ok) == ("0.810", True)


def test_cells_are_taken_in_turn_there_and_back() -> None:
    """With adapters and without, of one repeat, are next to each other, and either comes first."""
    runs = plan_of(chosen_cells=((8, 8), (0, 8)), repeats=3, interleave=True).runs
    assert runs == [(8, 8, 0), (0, 8, 0), (0, 8, 1), (8, 8, 1), (8, 8, 2), (0, 8, 2)]
    runs = plan_of(chosen_cells=((8, 8), (0, 8)), repeats=2).runs
    assert runs == [(8, 8, 0), (8, 8, 1), (0, 8, 0), (0, 8, 1)]


@pytest.mark.parametrize(
    ("cell", "value", "short"),
    [
        ((32, 32), 299.0, ["32 adapters, 32 requests at once: times the best peer's tokens/s"]),
        ((8, 8), 249.0, ["8 adapters, 8 requests at once: times the best peer's tokens/s"]),
        ((0, 8), 79.0, ["base only, 8 requests at once: times vllm-base's tokens/s",
                        "base only, 8 requests at once: times openvino-int8's tokens/s"]),
        ((1, 1), 79.0, ["1 adapter, 1 request at once: times the best peer's tokens/s"]),
    ],
)  # fmt: skip
def test_matrix_below_a_bar(
    written: Callable[[list[dict[str, Any]]], Path],
    cell: tuple[int, int],
    value: float,
    short: list[str],
) -> None:
    figures = matrix_figures(written(matrix({**OURS, cell: value})))
    assert [f.name for f in figures if f.is_ok is False] == short


def test_a_best_peer_without_all_peers_is_short(
    written: Callable[[list[dict[str, Any]]], Path],
) -> None:
    kept = [r for r in matrix(OURS) if r["contender"] != "vllm"]
    figures = [f for f in matrix_figures(written(kept)) if "best peer" in f.name]
    assert len(figures) == 4
    for figure in figures:
        assert figure.is_ok is False
        assert figure.note == "no accepted run of vllm"
    kept = [r for r in matrix(OURS) if r["contender"] != "lorary-int8"]
    best = [f for f in matrix_figures(written(kept)) if "openvino-int8's" in f.name]
    assert [f.is_ok for f in best] == [False, False]


def test_work_and_bound_by_hand() -> None:
    shape = Shape(
        layer_weights=1000,
        head_weights=100,
        adapter_row_weights=10,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    todo = work(shape, rows=3, logits_rows=3, context=5, adapters=2, rank=4)
    # Weights, head, two adapters of four rows; 15 positions of two layers' keys and values.
    assert todo.bytes_read == 2 * (1000 + 100 + 2 * 4 * 10 + 15 * 2 * 2 * 2 * 8)
    # Three rows: layers and head, attention over 5 keys of 4 heads twice, rank 4 both ways.
    assert todo.bf16_operations == 3 * 2 * (1000 + 100 + 2 * 5 * 2 * 4 * 8 + 4 * 10)
    machine = Machine(bandwidth=1e3, bf16_peak=1e4, int8_peak=1e5)
    assert bound_s(todo, machine) == max(memory_s(todo, machine), compute_s(todo, machine))
    small = work(shape, rows=3, logits_rows=3, context=5, adapters=2, rank=4, int8=True)
    assert small.int8_operations == 3 * 2 * 1000
    assert small.bf16_operations == todo.bf16_operations - small.int8_operations
    assert small.bytes_read == todo.bytes_read - 2000 + 1125


def test_known_adapters_are_many_and_those_asked_for_are_whole() -> None:
    chosen = cases()
    made = {m.name: m for m in members(chosen, repeats=2, num_calls=96)}
    known, resident, mixed, one = chosen
    assert len(known.adapters) == 1000 == len({made[n].seed for n in known.adapters})
    for repeat in range(2):
        drawn = known.draw(repeat, 96)
        assert drawn == known.draw(repeat, 96)
        assert len(set(drawn)) > NUM_RESIDENT
        assert all((made[n].rank, made[n].targets) == (16, ()) for n in drawn)
    assert all(made[n].rank == 16 for n in known.adapters[:NUM_FITTING])
    assert set(resident.adapters) < set(known.adapters)
    assert sum(made[n].rank for n in mixed.adapters) == sum(made[n].rank for n in one.adapters)
    assert {made[n].rank for n in one.adapters} == {MEAN_RANK}
    assert known.name == KNOWN
