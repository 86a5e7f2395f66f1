"""``lorary bench`` and ``lorary chat`` against a real gRPC server around a model on paper."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from lorary.cli import load
from lorary.cli.load import Outcome, Plan, percentiles, summarize
from lorary.client import AsyncClient
from tests.edge.fakes import eventually, serving

if TYPE_CHECKING:
    from pathlib import Path

MAIN = "from lorary.cli.main import main; main()"


def plan(**changes: object) -> Plan:
    values: dict[str, object] = {
        "adapters": ("alpha", "beta", ""),
        "skew": 0.0,
        "num_calls": 12,
        "concurrency": 4,
        "rate": 0.0,
        "prompts": ((2, 5),),
        "new_tokens": 3,
        "seed": 7,
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


async def lorary(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MAIN, *arguments],
            capture_output=True, text=True, input=stdin, timeout=120, check=False,
        )  # fmt: skip

    done = await asyncio.to_thread(run)
    return done.returncode, done.stdout, done.stderr


async def test_every_call_is_made_once_and_the_same_seed_asks_the_same() -> None:
    async with serving() as edge, AsyncClient(edge.address) as client:
        seen: list[Outcome] = []
        outcomes = await load.run(client, plan(), on_end=seen.append)
        assert len(outcomes) == len(seen) == 12
        assert {(o.num_tokens, o.error, len(o.gaps_s)) for o in outcomes} == {(3, "", 2)}
        assert all(0 < (o.first_s or 0) <= o.end_s for o in outcomes)
        report = summarize(outcomes)
        assert (report.num_answers, report.errors) == (12, {})
        assert report.tokens_per_s == pytest.approx(36 / report.seconds, rel=0.05)
        again = await load.run(client, plan())
        assert Counter(o.adapter for o in again) == Counter(o.adapter for o in outcomes)
        assert len({o.adapter for o in outcomes}) == 3


@pytest.mark.alone
async def test_who_waits_to_be_sent_has_waited() -> None:
    async with serving() as edge, AsyncClient(edge.address) as client:
        edge.engine.gate.clear()
        running = asyncio.ensure_future(
            load.run(client, plan(num_calls=3, concurrency=1, rate=1000.0))
        )
        await eventually(lambda: bool(edge.engine.submitted))
        await asyncio.sleep(0.3)
        edge.engine.gate.set()
        outcomes = await running
    # All were due at once; the last stood behind the others, and says so.
    assert min(o.first_s or 0 for o in outcomes) > 0.25
    assert max(o.due_s for o in outcomes) < 0.2


async def test_errors_are_figures_and_the_exit_code(tmp_path: Path) -> None:
    numbers, records = tmp_path / "numbers.txt", tmp_path / "records.jsonl"
    numbers.write_text(" ".join(str(k) for k in range(40)))
    common = ["--prompt-file", str(numbers), "--prompt-tokens", "8", "--max-tokens", "2", "--json"]
    async with serving() as edge:
        target = ["--target", edge.address]
        code, out, err = await lorary(
            "bench", *target, *common, "-n", "6", "--adapter", "alpha", "--adapter", "nobody",
            "--records", str(records), "--plot", str(tmp_path / "plot.svg"),
        )  # fmt: skip
        assert code == 1, err
        report = json.loads(out)
        failed = report["errors"]["ADAPTER_NOT_FOUND"]
        assert report["num_answers"] == 6 - failed == report["calls_by_adapter"]["alpha"]
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        assert [line["error"] != "" for line in lines].count(True) == failed
        assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
        code, out, err = await lorary("bench", *target, *common, "-n", "4")
        assert (code, json.loads(out)["calls_by_adapter"]) == (0, {"": 4}), err


async def test_chat_remembers_whole_answers_and_changes_adapters() -> None:
    async with serving() as edge:
        said = "2 5\n/adapter beta\n9\n/undo\n/adapter\n9\n/new\n3\n"
        code, out, err = await lorary(
            "chat", "alpha", "--max-tokens", "2", "--target", edge.address, stdin=said
        )
        assert code == 0, err
        prompts = [list(request.prompt_ids) for request in edge.engine.submitted]
        assert prompts == [[200, 2, 5], [200, 2, 5, 7, 9, 9], [200, 2, 5, 7, 9, 9], [200, 3]]
        assert out.split("\n")[:3] == ["7 9 ", "12 15 ", "10 11 "]
        assert [line.split(" ")[0] for line in err.splitlines()] == [
            "[alpha@1", "[beta@1", "[base", "[base",
        ]  # fmt: skip
        code, _, err = await lorary("chat", "--target", edge.address, stdin="/nonsense\n")
        assert (code, "'/nonsense' is no command" in err) == (2, True)


def test_popularity_follows_zipfs_law() -> None:
    asked = plan(adapters=tuple("abcd"), skew=1.0)
    rng = random.Random(1)
    calls = load._calls(asked, rng)
    counts = Counter(next(calls)[0] for _ in range(25_000))
    assert [round(counts[name] / counts["d"]) for name in "abcd"] == [4, 2, 1, 1]


def test_percentiles_are_ranks() -> None:
    assert percentiles([k / 1000 for k in range(1, 101)]) == {
        "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0,
    }  # fmt: skip
    assert percentiles([0.002]) == dict.fromkeys(("p50", "p90", "p95", "p99"), 2.0)
    assert percentiles([]) == {}
