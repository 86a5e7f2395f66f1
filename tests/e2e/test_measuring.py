"""The demo's, the verification's and the benchmark's arithmetic, on cases done by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.agreement import Agreement, disagreements
from benchmarks.harness.load import CpuMeter
from benchmarks.kept import make_all
from benchmarks.measure import figures
from benchmarks.plot import draw
from benchmarks.workload import Trace, choose
from scripts.demo_calls import plan_calls
from scripts.demo_report import TaskResult, standard_error
from scripts.demo_steps import Steps, content_key
from scripts.verify_figures import bench_figures, demo_figures, suite_figures

CELL = report.Cell(8, 8)


def run_record(contender: str, tokens_per_s: float, *, accepted: bool = True) -> dict[str, Any]:
    latency = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    return {
        "kind": "run",
        "contender": contender,
        "adapters": CELL.adapters,
        "concurrency": CELL.concurrency,
        "repeat": 0,
        "output_tokens_per_s": tokens_per_s,
        "ttft_ms": latency,
        "itl_ms": latency,
        "accepted": accepted,
        "load": {"foreign_cores": 0.0},
    }


def test_speed_counts_from_the_first_request_to_the_last_token() -> None:
    traces = [
        Trace(10.0, [1, 2, 3], [10.5, 10.6, 10.8]),
        Trace(10.2, [4, 5, 6], [10.4, 10.9, 12.0]),
    ]
    found = figures(traces)
    assert found["output_tokens"] == 6
    assert found["output_tokens_per_s"] == pytest.approx(3.0)
    assert found["ttft_ms"]["p50"] == pytest.approx(350)  # of 500 and 200
    assert found["itl_ms"]["p50"] == pytest.approx(350)  # of 100, 200, 500, 1100


def test_children_that_ended_are_our_own_load() -> None:
    meter = CpuMeter()
    busy = "import time; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    started_s = time.monotonic()
    subprocess.run([sys.executable, "-c", busy], check=True)
    load, seconds = meter.stop(), time.monotonic() - started_s
    assert load.own * seconds >= 0.55


def test_disturbed_runs_do_not_count() -> None:
    records = [run_record("lorary", v) for v in (90.0, 100.0, 140.0)]
    records += [run_record("lorary", 1.0, accepted=False), run_record("peft", 40.0)]
    found = report.medians(records)
    assert found["lorary"][CELL].tokens_per_s == 100
    assert found["lorary"][CELL].repeats == 3
    assert report.ratio(found, CELL, "lorary", "peft") == 2.5
    assert "| 2.5x |" in report.table(records)


def test_what_was_disturbed_is_made_again_behind_all_others() -> None:
    made: list[tuple[str, int]] = []

    def make(run: str, number: int) -> bool:
        made.append((run, number))
        # One is never quiet, one only the third time.
        return run == "quiet" or (run == "late" and number == 2)

    assert make_all(["never", "late", "quiet"], make, 4) == ["never"]
    assert made == [
        *((run, 0) for run in ("never", "late", "quiet")),
        *((run, number) for number in (1, 2) for run in ("never", "late")),
        ("never", 3),
    ]


def test_table_says_what_adapters_cost() -> None:
    bare = [{**run_record(name, 50.0), "adapters": 0} for name in ("lorary", "peft")]
    text = report.table([*bare, run_record("lorary", 40.0), run_record("peft", 10.0)])
    assert [line.rsplit("|", 2)[1].strip() for line in text.splitlines()] == [
        "lorary / no adapter",
        "---:",
        "-",
        "80%",
    ]


def test_picture_has_a_line_for_everybody(tmp_path: Path) -> None:
    records = [{**run_record("lorary", 50.0), "adapters": k} for k in (0, 8)]
    records += [{**run_record("peft", 9.0), "adapters": k} for k in (0, 8)]
    for name in ("a.svg", "b.svg"):
        draw(records, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "lorary" in text
    assert "peft" in text


def test_picture_with_many_peers_names_each_of_them_once(tmp_path: Path) -> None:
    """Who was measured without adapters only has one mark, and its name all the same."""
    names = ["lorary", "peft", "vllm", "llama.cpp", "openvino-int8", "somebody new"]
    records = [
        {**run_record(name, 10.0 * i + 5), "adapters": k, "concurrency": c}
        for i, name in enumerate(names)
        for k in (0, 8, 32)
        for c in (8, 32)
    ]
    records.append({**run_record("vllm-base", 90.0), "adapters": 0, "concurrency": 32})
    draw(records, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for name in (*names, "vllm-base"):
        assert text.count(f"<!-- {name} -->") == 1


@pytest.mark.parametrize(("ours", "is_ok"), [(81.0, True), (79.0, False)])
def test_the_benchmarks_bar(tmp_path: Path, ours: float, is_ok: bool) -> None:
    path = tmp_path / "runs.jsonl"
    for record in (run_record("lorary", ours), run_record("peft", 40.0)):
        report.append(path, record)
    (figure,) = bench_figures(path)
    assert figure.is_ok is is_ok
    (missing,) = bench_figures(tmp_path / "nothing.jsonl")
    assert not missing.is_ok


def test_zipf_prefers_the_first_and_distinct_takes_turns() -> None:
    names = [f"a{i}" for i in range(8)]
    zipf = choose(names, 4000, "zipf", random.Random(0))
    assert zipf.count("a0") > 3 * zipf.count("a3") > 0
    assert choose(names, 10, "distinct", random.Random(0)) == [*names, "a0", "a1"]
    assert choose([], 2, "uniform", random.Random(0)) == [None, None]


def test_wrong_answers_are_not_measured() -> None:
    def said(contender: str, share: float) -> Agreement:
        return Agreement(
            contender=contender,
            against="peft float32",
            free_running=0.5,
            whole_answers=1,
            num_answers=2,
            telling_tokens=share,
        )

    peft, base = said("peft", 0.85), said("base, no adapter", 0.1)
    assert not disagreements([peft, base, said("lorary", 0.8)])
    (line,) = disagreements([peft, base, said("lorary", 0.4)]).values()
    assert "lorary agrees" in line


def test_noise_is_what_the_items_say() -> None:
    references = ["a"] * 100
    predictions = ["a"] * 80 + ["b"] * 20
    assert standard_error("accuracy", predictions, references) == pytest.approx(0.04)
    assert standard_error("rougeL", ["x y"] * 10, ["x y"] * 10) == 0
    sentences = [f"the {w} cat sat on the mat" for w in ("red", "big", "old", "sad", "wet")] * 4
    wrong = [s.replace("mat", "hat") if i % 2 else s for i, s in enumerate(sentences)]
    assert 0 < standard_error("bleu", wrong, sentences) < 20


def test_worse_than_promised_by_more_than_noise_is_a_failure() -> None:
    result = TaskResult(
        task="sentiment",
        metric="accuracy",
        num_items=400,
        base=0.6,
        adapter=0.85,
        served=0.82,
        noise=0.04,
        all_base={},
        all_adapter={},
        all_served={},
        p50_ms=1.0,
        version=1,
        digest="sha256:0",
    )
    assert result.is_as_promised
    assert not replace(result, served=0.80).is_as_promised


def test_every_item_is_asked_once_and_the_base_beside_it() -> None:
    texts = {"sentiment": ["a", "b", "c"], "translation": ["d", "e"]}
    calls = plan_calls(texts, {"sentiment"}, num_base=1)
    assert len({(c.task, c.index, c.kind) for c in calls}) == len(calls) == 3 + 3 + 2 + 2
    assert calls == plan_calls(texts, {"sentiment"}, num_base=1)


def test_a_finished_step_is_reused_until_what_it_depends_on_changes(tmp_path: Path) -> None:
    from rich.console import Console

    done: list[str] = []

    def work() -> dict[str, Any]:
        done.append("work")
        return {"answer": 42}

    def steps() -> Steps:
        return Steps(tmp_path, Console(quiet=True), total=1)

    for _ in range(2):
        assert steps().run("train it", content_key("recipe"), work) == {"answer": 42}
    assert len(done) == 1
    steps().run("train it", content_key("another recipe"), work)
    assert len(done) == 2
    steps().run("train it", content_key("another recipe"), work, is_there=lambda: False)
    assert len(done) == 3


LOG = """
SKIPPED [2] tests/server/test_gpu.py:20: needs an NVIDIA GPU
{more}
=========== 400 passed, {skipped} skipped in 312.10s (0:05:12) ===========
"""


def test_only_a_missing_device_excuses_a_skipped_test() -> None:
    fine = suite_figures(LOG.format(more="", skipped=2), 320.0)
    assert all(figure.is_ok for figure in fine)
    needless = LOG.format(more="SKIPPED [1] tests/deploy/x.py:3: no promtool", skipped=3)
    short = [figure for figure in suite_figures(needless, 320.0) if not figure.is_ok]
    assert [figure.name for figure in short] == ["make test: skipped"]
    assert "no promtool" in short[0].note
    assert not all(figure.is_ok for figure in suite_figures("collected 0 items", 1.0))


def test_the_demos_bars() -> None:
    summary = json.loads((Path(__file__).parent / "demo_summary.json").read_text())
    assert all(figure.is_ok for figure in demo_figures(summary))
    summary["tasks"]["sentiment"]["served"] = 0.79
    summary["steps_by_distinct_adapters"] = [5, 100]
    short = {figure.name for figure in demo_figures(summary) if not figure.is_ok}
    assert short == {
        "sentiment: accuracy, served",
        "sentiment: served minus trainer's accuracy",
        "demo: steps shared by two adapters or more",
        "demo: most adapters in one step",
    }
