"""Vectors of prompts: transformers' last hidden states with PEFT in float32, one prompt at a time, pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.server.engine.request import Pooling
from tests.server.test_dora import take_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorary.server.engine.request import Finish
    from tests.server.conftest import EngineWorld

MEAN, LAST = Pooling(kind="mean"), Pooling(kind="last")
PROMPTS = [[5 + (7 * i) % 100 for i in range(n)] for n in (70, 1, 33)]
NAMES = ("alpha", "", "charlie")


def hidden_states(base: Path, adapter: Path | None, prompt: Sequence[int]) -> torch.Tensor:
    """What enters the head of the untouched model: float64 [tokens, width], of float32 numbers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    body = model.model
    if adapter is not None:
        body = PeftModel.from_pretrained(model, str(adapter)).eval().base_model.model.model
    with torch.inference_mode():
        hidden: torch.Tensor = body(torch.tensor([list(prompt)])).last_hidden_state[0]
    return hidden.double()


def embedded(world: EngineWorld, request_id: str) -> Finish:
    tokens, finish, error = world.collector.wait(request_id)
    assert error is None, error
    assert finish is not None
    assert (tokens, finish.reason, finish.completion_tokens) == ([], "embedded", 0)
    return finish


@pytest.mark.parametrize("budget", [512, 16])
@pytest.mark.parametrize("path", ["layers", "torch"])
def test_vectors_in_a_mixed_batch_are_the_models(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    budget: int,
) -> None:
    """Both poolings of three prompts under three adapters, whole or in chunks, beside text and scores."""
    take_path(path, monkeypatch)
    world = make_world(prefill_budget=budget, max_batch=32, start=False)
    assert (world.fused is not None) == (path == "layers")
    for name in ("alpha", "bravo", "charlie"):
        world.residency.load(world.registry.resolve(name))
    others = [
        world.submit(PROMPTS[2][:9], "bravo", max_tokens=8, ignore_eos=True),
        world.submit(PROMPTS[0][:20], "alpha", labels=((5, 6), (7,))),
        world.submit(PROMPTS[0][:30], "charlie", max_tokens=1, prompt_logprobs=0),
    ]
    asked = {
        (name, place, pooling): world.submit(prompt, name, pooling=pooling)
        for place, prompt in enumerate(PROMPTS)
        for name in NAMES
        for pooling in (MEAN, LAST)
    }
    world.engine.start()
    for name in NAMES:
        for place, prompt in enumerate(PROMPTS):
            adapter = tiny_adapters[name] if name else None
            hidden = hidden_states(tiny_base, adapter, prompt)
            for pooling, wanted in ((MEAN, hidden.mean(0)), (LAST, hidden[-1])):
                vector = embedded(world, asked[name, place, pooling]).embedding
                torch.testing.assert_close(
                    torch.tensor(vector, dtype=torch.float64), wanted, atol=1e-4, rtol=1e-4
                )
    for request_id in others:
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        assert finish.embedding == ()
    assert max(step.num_distinct_adapters for step in world.collector.steps) >= 2


def test_the_last_token_reuses_a_prefix_and_the_mean_reads_it_again(
    make_world: Callable[..., EngineWorld],
) -> None:
    world = make_world()
    first = [embedded(world, world.submit(PROMPTS[0], "alpha", pooling=p)) for p in (MEAN, LAST)]
    again = [embedded(world, world.submit(PROMPTS[0], "alpha", pooling=p)) for p in (MEAN, LAST)]
    assert [one.cached_tokens for one in first] == [0, 64]
    assert [one.cached_tokens for one in again] == [0, 64]
    for one, other in zip(first, again, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)


def test_vectors_are_cut_and_then_made_of_length_one(
    make_world: Callable[..., EngineWorld],
) -> None:
    world = make_world()
    whole = torch.tensor(embedded(world, world.submit(PROMPTS[2], pooling=MEAN)).embedding)
    cut = Pooling(kind="mean", dimensions=8, is_normalized=True)
    short = torch.tensor(embedded(world, world.submit(PROMPTS[2], pooling=cut)).embedding)
    torch.testing.assert_close(short, whole[:8] / whole[:8].norm(), atol=1e-6, rtol=1e-5)


def test_a_mean_survives_a_preemption(make_world: Callable[..., EngineWorld]) -> None:
    """A prompt that is read token by token loses its blocks to answers that grow, and comes back."""
    roomy = make_world(start=False)
    memory = 10 * roomy.engine._cache.shape.block_bytes(torch.float32)
    alone = make_world()
    wanted = embedded(alone, alone.submit(PROMPTS[0], pooling=MEAN)).embedding
    world = make_world(kv_memory_bytes=memory, prefill_budget=1, prefix_cache=False, start=False)
    text = [world.submit([9 + i] * 40, max_tokens=120, ignore_eos=True) for i in range(2)]
    vectors = [world.submit(PROMPTS[0], pooling=MEAN) for _ in range(2)]
    world.engine.start()
    for request_id in vectors:
        found = embedded(world, request_id).embedding
        assert found == pytest.approx(wanted, abs=1e-5)
    assert sum(step.num_preempted for step in world.collector.steps) > 0
    for request_id in text:
        assert world.collector.wait(request_id)[2] is None
