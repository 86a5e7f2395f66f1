"""The benchmarks' own machinery over a real engine: steps by hand, loads while a run goes on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.contenders.lorary_engine import LoraryEngine
from benchmarks.harness.stepper import HEAD, LAYERS, PARTS, Stepper
from benchmarks.harness.stopwatch import Stopwatch
from benchmarks.library import Member, adapter_bytes, bytes_on_disk, fill
from benchmarks.mix_cases import Case
from benchmarks.mix_run import Comings, PreparedRun
from benchmarks.workload import Call
from lorary.bases import find_base
from lorary.registry import Registry
from lorary.server.engine.assemble import EngineLimits

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.bases import Base

NAMES = tuple(f"member-{k}" for k in range(6))
RANK = 8


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return find_base(tiny_base)


@pytest.fixture(scope="module")
def library(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, Path]:
    root = tmp_path_factory.mktemp("library")
    registry = Registry.open(root / "store", create=True)
    fill(registry, base, [Member(name, RANK, k) for k, name in enumerate(NAMES)], root / "one")
    assert not (root / "one").exists()
    return registry, root / "store"


def prompts(count: int) -> list[tuple[int, ...]]:
    source = random.Random(count)
    return [tuple(source.randrange(3, 118) for _ in range(9)) for _ in range(count)]


def test_no_two_members_share_their_tensors(base: Base, library: tuple[Registry, Path]) -> None:
    registry, folder = library
    assert len({registry.resolve(name).digest for name in NAMES}) == len(NAMES)
    assert bytes_on_disk(folder) > len(NAMES) * adapter_bytes(base, RANK)


def test_steps_by_hand_have_their_parts(base: Base, library: tuple[Registry, Path]) -> None:
    stepper = Stepper(
        base,
        library[0],
        dtype=torch.float32,
        int8=False,
        max_rows=4,
        adapter_memory_bytes=4 * 2 * adapter_bytes(base, RANK),
    )
    try:
        stepper.load(NAMES[:3])
        for _ in range(2):
            stepper.start_rows(prompts(4), [*NAMES[:3], None], max_tokens=20)
            stepper.read_prompts()
            running = stepper.engine._scheduler.running
            assert [s.num_generated for s in running] == [1] * 4
            assert stepper.step() > 0
            times = stepper.profile(3)
            # One token a row in each of the eight steps: the profiled ones are real steps.
            assert [s.num_generated for s in running] == [8] * 4
            assert tuple(times.parts_ms) == PARTS
            assert all(ms > 0 for ms in times.parts_ms.values())
            assert times.parts_ms[LAYERS] + times.parts_ms[HEAD] < sum(times.parts_ms.values())
            assert times.overhead_ms > 0
            stepper.end_rows()
            assert not stepper.engine.num_running
            with pytest.raises(RuntimeError, match="no step"):
                stepper.step()
        stepper.start_rows(prompts(2), [None, None], max_tokens=4)
        stepper.read_prompts()
        assert len(stepper.time_steps(2)) == 2
        with pytest.raises(RuntimeError, match="2 ended while 1 steps were timed"):
            stepper.time_steps(1)
        stepper.end_rows()
        assert all(r.num_holders == 0 for r in stepper._residency.snapshot())
    finally:
        stepper.close()


def test_a_cold_run_loads_what_it_asks_for_each_time(
    base: Base, library: tuple[Registry, Path]
) -> None:
    """Memory for two of six: a run begins with the two most popular, however the one before ended."""
    registry, folder = library
    comings = Comings()
    engine = LoraryEngine(
        base,
        registry,
        dtype=torch.float32,
        limits=EngineLimits(
            max_batch=2, max_context=64, adapter_memory_bytes=2 * 2 * adapter_bytes(base, RANK)
        ),
        residency_observer=comings,
    )
    try:
        case = Case("cold", NAMES, "zipf", 2, is_cold=True)
        run = PreparedRun(case, engine, registry, folder, comings)
        asked = [NAMES[0], NAMES[5], NAMES[1], NAMES[4], NAMES[5]]
        calls = [
            Call(prompt_ids=p, adapter=a) for p, a in zip(prompts(len(asked)), asked, strict=True)
        ]
        for _ in range(2):
            traces = run.run(calls, concurrency=2, new_tokens=3)
            assert [len(t.token_ids) for t in traces] == [3] * len(asked)
            assert run.counted["resident_at_first"] == 2
            assert (run.counted["calls_without_load"], run.counted["asked_adapters"]) == (2, 4)
            assert run.counted["loads"] >= 2
            assert run.counted["evictions"] >= 2
        assert engine.resident <= set(NAMES)
    finally:
        engine.close()


def test_stopwatch_gives_each_second_to_the_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 8.0, 8.5])
    monkeypatch.setattr("benchmarks.harness.stopwatch.time.perf_counter", lambda: next(now))

    class Thing:
        def inner(self) -> str:
            return "answer"

    thing = Thing()
    watch = Stopwatch()
    watch.wrap(thing, "inner", "inner")
    with watch.part("outer"):
        assert thing.inner() == "answer"
    assert watch.take() == {"outer": 2.0, "inner": 2.0}
    assert watch.take() == {}
    watch.unwrap()
    assert "inner" not in vars(thing)
