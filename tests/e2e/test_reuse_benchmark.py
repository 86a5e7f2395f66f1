"""The benchmark of pipelines over one document, on a tiny base: what is read, and what its table says."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.contenders.lorary_engine import LoraryEngine
from benchmarks.library import fill, num_layers
from benchmarks.reuse_run import (
    ALORA,
    ANSWER_TOKENS,
    COLD,
    LATE,
    LORA,
    VERDICT_TOKENS,
    WAYS,
    _pipeline,
    first_late,
    judge_members,
    same_verdicts,
    table_of,
)
from lorary.bases import find_base
from lorary.registry import Registry
from lorary.server.engine.assemble import EngineLimits
from lorary.server.engine.blocks import BLOCK

if TYPE_CHECKING:
    from pathlib import Path

INVOCATIONS = [(70, 71, 72), (60, 61, 62)]
DOCUMENT = tuple(range(5, 105))


@pytest.fixture(scope="module")
def registry(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    root = tmp_path_factory.mktemp("reuse")
    store = Registry.open(root / "store", create=True)
    base = find_base(tiny_base)
    members = judge_members(INVOCATIONS, first_late(num_layers(base)), 8)
    fill(store, base, members, root / "one")
    return store


def test_alora_reads_the_document_once_and_late_judges_only_above(
    tiny_base: Path, registry: Registry
) -> None:
    records = []
    for way in WAYS:
        engine = LoraryEngine(
            find_base(tiny_base),
            registry,
            dtype=torch.float32,
            limits=EngineLimits(
                max_batch=2,
                max_context=256,
                prefix_cache=way != COLD,
                shared_layers=first_late(2) if way == LATE else 0,
                draft_rows=0,
            ),
        )
        try:
            firsts = itertools.count(3)
            for number in range(2):
                found = _pipeline(engine, way, number, DOCUMENT, INVOCATIONS, firsts)
                records.append({**found, "accepted": True})
        finally:
            engine.close()
    shared = 1 + len(DOCUMENT) + ANSWER_TOKENS
    whole = shared + 3
    for record in records:
        # Of the base's last block there are too few tokens to be kept.
        in_blocks = shared // BLOCK * BLOCK
        expected = whole - in_blocks if record["way"] == ALORA else whole
        assert record["num_read"] == [expected, expected], record["way"]
        assert record["num_above"] == [in_blocks * (record["way"] == LATE)] * 2, record["way"]
        assert len(record["ttft_ms"]) == len(INVOCATIONS)
        assert record["seconds"] * 1e3 > sum(record["ttft_ms"])
    same, compared = same_verdicts(records)
    assert same == compared == 2 * 2 * 2 * VERDICT_TOKENS
    assert f"| {LORA} | {whole} | 0 |" in table_of(records)
