"""The benchmark of pipelines over one document, on a tiny base: what is read, and what its table says."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.contenders.lorary_engine import LoraryEngine
from benchmarks.library import Member, fill
from benchmarks.reuse_run import (
    ALORA,
    ANSWER_TOKENS,
    COLD,
    LORA,
    WAYS,
    _pipeline,
    judge_name,
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
    members = [
        Member(judge_name(way, i), 8, i, invocation=tokens if way == ALORA else ())
        for way in (ALORA, LORA)
        for i, tokens in enumerate(INVOCATIONS)
    ]
    fill(store, find_base(tiny_base), members, root / "one")
    return store


def test_only_alora_with_the_prefix_cache_reads_the_document_once(
    tiny_base: Path, registry: Registry
) -> None:
    records = []
    for way in WAYS:
        engine = LoraryEngine(
            find_base(tiny_base),
            registry,
            dtype=torch.float32,
            limits=EngineLimits(
                max_batch=2, max_context=256, prefix_cache=way != COLD, draft_rows=0
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
        expected = whole - shared // BLOCK * BLOCK if record["way"] == ALORA else whole
        assert record["num_read"] == [expected, expected], record["way"]
        assert len(record["ttft_ms"]) == len(INVOCATIONS)
        assert record["seconds"] * 1e3 > sum(record["ttft_ms"])
    same, compared = same_verdicts(records)
    assert same == compared > 0
    assert f"| {LORA} | {whole} |" in table_of(records)
