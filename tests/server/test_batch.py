"""A step that follows from the one before equals the same step laid out anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lorary.server.engine import engine as engine_module
from lorary.server.engine.batch import Batch, build_batch
from tests.conftest import RECIPES
from tests.server.test_engine_oracle import prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from tests.server.conftest import EngineWorld


def contents(batch: Batch) -> list[Any]:
    plan, segments = batch.plan, batch.segments
    tensors = [batch.token_ids, batch.position_ids, batch.logits_rows]
    tensors += [plan.slots, plan.positions, plan.lengths, plan.write_index]
    if segments is not None:
        tensors += [segments.short_rows, segments.short_entry, segments.rank_rows]
    counts = (batch.num_decode, batch.num_prefill_tokens, batch.num_distinct_adapters)
    return [*(t.tolist() for t in tensors), plan.chunks, batch.samplers, batch.advanced, counts]


def test_a_step_that_follows_equals_one_made_anew(
    make_world: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While answers begin, end, are preempted for want of blocks, and read again."""
    num_followed = 0

    def build(*arguments: Any, last: Batch | None, **options: Any) -> Batch:
        nonlocal num_followed
        batch = build_batch(*arguments, last=last, **options)
        anew = build_batch(*arguments, **options)
        assert contents(batch) == contents(anew)
        num_followed += batch.segments is not None and batch is last
        return batch

    monkeypatch.setattr(engine_module, "build_batch", build)
    # Blocks for three answers of this length, of six that run at once.
    block_bytes = 2 * 2 * 2 * 32 * 16 * torch.float32.itemsize
    world = make_world(max_batch=6, draft_rows=0, kv_memory_bytes=9 * block_bytes, start=False)
    for name in RECIPES:
        world.residency.load(world.registry.resolve(name), pin=True)
    names = [*RECIPES, ""]
    asked = zip(prompts(len(names), longest=30), names, strict=True)
    ids = [
        world.submit(p, n, max_tokens=70 + 5 * i, ignore_eos=True) for i, (p, n) in enumerate(asked)
    ]
    world.engine.start()
    for request_id in ids:
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
    assert num_followed > 20
    assert sum(s.num_preempted for s in world.collector.steps) > 0
