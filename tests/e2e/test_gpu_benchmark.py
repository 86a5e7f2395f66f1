"""The GPU benchmark: every part of it on a CPU in tiny shapes, and its arithmetic done by hand.

Nothing here is a figure of a GPU: the same code runs on another device.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import gpu_run, report
from benchmarks.gpu_run import PARTS, Setup, measure
from benchmarks.gpu_shapes import SHAPES
from benchmarks.gpu_tables import table_of
from benchmarks.harness.gpu_peers import decode_rate
from scripts.gpu_figures import gpu_figures
from scripts.trainer_figures import MEMORY_RATIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TINY = Setup(
    shape="tiny",
    device="cpu",
    dtype="float32",
    rows=(1, 3),
    adapters=2,
    rank=4,
    prompt_tokens=6,
    steps=8,
    train_rows=2,
    train_length=12,
)


def run(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(gpu_run, "RANKS", (3,))
    records = report.read(measure(TINY, [part], tmp_path / "records.jsonl"))
    assert [r for r in records if r["kind"] == "failed"] == []
    assert all(r["setup"]["gpu"]["name"] == "cpu" for r in records)
    return records


@pytest.mark.parametrize("part", ["decode-bf16", "decode-nf4"])
def test_engine_decodes_with_adapters_and_without(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = run(part, tmp_path, monkeypatch)
    assert [(r["rows"], r["adapters"]) for r in records] == [(1, 0), (1, 1), (3, 0), (3, 2)]
    shape = SHAPES["tiny"]
    for r in records:
        assert r["tokens_per_s"] == pytest.approx(r["rows"] / r["step_ms"] * 1e3, rel=0.01)
        assert r["adapter_bytes"] == r["adapters"] * 4 * shape.adapter_row * 4
        # Whole layers in native calls launch none of torch's operators.
        assert (r["launches"] > 0) == (part == "decode-nf4")
    kv = shape.kv_bytes(6 + 8 + 4, 4)
    layers = sum(out * width for out, width in shape.modules.values())
    weights = records[0]["base_bytes"] - kv - shape.vocab * shape.hidden * 4
    if part == "decode-nf4":
        # Half a byte for a weight, and of each 64 a scale of a byte.
        assert layers * (0.5 + 1 / 64) <= weights <= layers * (0.5 + 1.3 / 64)
    else:
        assert weights == 4 * layers


def test_peers_decode_the_same_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = run("peft", tmp_path, monkeypatch)
    assert (record["rows"], record["adapters"]) == (2, 2)
    found = run("batching", tmp_path, monkeypatch)
    assert [(r["peer"], r["rows"]) for r in found[1:]] == [("transformers", 1), ("transformers", 3)]


def test_kernels_are_measured_where_they_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    copied = run("copy", tmp_path, monkeypatch)
    assert copied[0]["bytes_per_s"] > 0
    records = run("kernels", tmp_path, monkeypatch)[1:]
    assert len(records) == len(SHAPES["tiny"].groups) * 4
    assert max(r["relative_difference"] for r in records) < 1e-5
    assert min(r["shrink_us"] for r in records) > 0


def test_training_learns_and_says_what_memory_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = run("training", tmp_path, monkeypatch)
    assert [r["gradient_checkpointing"] for r in records] == [True, False]
    for r in records:
        assert len(r["losses"]) == 4
        assert r["peak_memory_bytes"] > 0
        # Base, adapter, its gradients and moments at least; on a CPU the process, too.
        assert r["expected_memory_bytes"] > 16 * r["num_trainable"]
        assert r["num_trainable"] == 4 * SHAPES["tiny"].adapter_row


def test_what_fails_is_said_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_setup: Setup) -> Iterator[dict[str, Any]]:
        yield {"kind": "copy", "bytes_per_s": 1.0}
        raise RuntimeError("the card is gone")

    monkeypatch.setitem(PARTS, "kernels", broken)
    records = report.read(measure(TINY, ["kernels", "copy"], tmp_path / "records.jsonl"))
    assert [r["kind"] for r in records] == ["copy", "failed", "copy"]
    assert "the card is gone" in table_of(records)
    figures = gpu_figures(tmp_path / "records.jsonl")
    assert any("the card is gone" in figure.note for figure in figures)
    assert all(not figure.is_ok for figure in figures)


def test_speed_is_what_longer_answers_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    now = iter([0.0, 5.5, 10.0, 16.5])
    clock = SimpleNamespace(perf_counter=lambda: next(now))
    monkeypatch.setattr("benchmarks.harness.gpu_peers.time", clock)
    found = decode_rate(asked.append, rows=4, short=1, long=3)
    # The first one is not on the clock.
    assert asked == [3, 1, 3]
    assert found == {"step_ms": 500.0, "tokens_per_s": 8.0}


def decode_record(base: str, rows: int, adapters: int, tokens_per_s: float) -> dict[str, Any]:
    return {
        "kind": "decode",
        "base": base,
        "graphs": False,
        "rows": rows,
        "adapters": adapters,
        "tokens_per_s": tokens_per_s,
        "step_ms": 1e3 * rows / tokens_per_s,
        "base_bytes": 10e9,
        "adapter_bytes": adapters * 62.5e6,
        "launches": 7,
        "device_ms": 1.0,
    }


def peer_record(name: str, rows: int, adapters: int, tokens_per_s: float) -> dict[str, Any]:
    return {
        "kind": "peer",
        "peer": name,
        "rows": rows,
        "adapters": adapters,
        "tokens_per_s": tokens_per_s,
    }


def training_record(gradient_checkpointing: bool, peak: float) -> dict[str, Any]:
    return {
        "kind": "training",
        "method": "qlora",
        "rows": 4,
        "length": 1024,
        "gradient_checkpointing": gradient_checkpointing,
        "peak_memory_bytes": peak,
        "expected_memory_bytes": 12e9 / MEMORY_RATIO,
        "tokens_per_s": 1000.0,
    }


@pytest.mark.parametrize(("factor", "is_ok"), [(1.0, True), (0.99, False)])
def test_bars(factor: float, is_ok: bool, tmp_path: Path) -> None:
    """32 adapters add 2 GB to 10: 5/6 of the speed is allowed, and nine tenths of that the bar."""
    records = [
        {"kind": "copy", "bytes_per_s": 4e12},
        *(decode_record(base, 32, 0, 8000) for base in ("bf16", "nf4")),
        *(decode_record(base, 32, 32, 6000 * factor) for base in ("bf16", "nf4")),
        decode_record("bf16", 64, 0, 12000 * factor),
        decode_record("bf16", 64, 32, 9000 * factor),
        peer_record("peft", 32, 32, 600),
        peer_record("transformers", 64, 0, 10000),
        *(training_record(kept, 12e9 / factor) for kept in (True, False)),
    ]
    path = tmp_path / "records.jsonl"
    for record in records:
        report.append(path, record)
    *barred, moved = gpu_figures(path)
    assert [figure.is_ok for figure in barred] == [is_ok] * 7
    assert moved.is_ok is None
    table = table_of(records)
    assert (
        f"| bf16 | eager | 32 | 8000 | 32 | {6000 * factor:.0f} | {0.75 * factor:.0%} | 83% |"
        in table
    )
    assert f"| peft | 32 | 32 | 600 | {6000 * factor:.0f} |" in table
