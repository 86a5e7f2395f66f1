"""Log probabilities of a prompt's own tokens are the model's, however the prompt is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld

PROMPT = [5 + (7 * i) % 100 for i in range(70)]


def by_transformers(base: Path, adapter: Path | None) -> torch.Tensor:
    """Log probabilities float32 [70, vocab] after each token of the prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return torch.log_softmax(model.eval()(torch.tensor([PROMPT])).logits[0], dim=-1)


@pytest.mark.parametrize("budget", [512, 16])
def test_they_are_the_models_whole_or_in_chunks_beside_others(
    make_world: Callable[..., EngineWorld],
    tiny_base: Path,
    tiny_adapters: dict[str, Path],
    budget: int,
) -> None:
    """A prompt that was read before is read again, for its rows are wanted; a scorer is beside it."""
    world = make_world(prefill_budget=budget)
    world.collector.wait(world.submit(PROMPT, "alpha", max_tokens=1))
    asked = {
        name: world.submit(PROMPT, name, max_tokens=1, prompt_logprobs=3) for name in ("alpha", "")
    }
    scored = world.submit(PROMPT[:20], labels=((5, 6), (7,)))
    free = world.submit(PROMPT[:9], max_tokens=8)
    for name, request_id in asked.items():
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        assert (finish.cached_tokens, len(finish.prompt_logprobs)) == (0, len(PROMPT))
        assert finish.prompt_logprobs[0].chosen == (PROMPT[0], 0.0)
        wanted = by_transformers(tiny_base, tiny_adapters[name] if name else None)
        for i, position in enumerate(finish.prompt_logprobs[1:]):
            assert position.chosen[0] == PROMPT[i + 1]
            assert position.chosen[1] == pytest.approx(float(wanted[i, PROMPT[i + 1]]), abs=1e-3)
            best = wanted[i].topk(3)
            assert [value for _, value in position.top] == pytest.approx(
                best.values.tolist(), abs=1e-3
            )
    for request_id in (scored, free):
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        assert finish.prompt_logprobs == ()


def test_they_survive_a_preemption(make_world: Callable[..., EngineWorld]) -> None:
    """Ten blocks for four answers that need five each: the latest are sent away, and come back."""
    roomy = make_world()
    memory = 10 * roomy.engine._cache.shape.block_bytes(torch.float32)
    alone = roomy.submit(PROMPT, max_tokens=1, prompt_logprobs=0)
    _, first, _ = roomy.collector.wait(alone)
    assert first is not None
    # Begun when all four are there: one after the other they would find room.
    world = make_world(kv_memory_bytes=memory, start=False)
    ids = [
        world.submit(PROMPT, max_tokens=80, ignore_eos=True, prompt_logprobs=0) for _ in range(4)
    ]
    world.engine.start()
    for request_id in ids:
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        values = [position.chosen[1] for position in finish.prompt_logprobs]
        assert values == pytest.approx([p.chosen[1] for p in first.prompt_logprobs], abs=1e-4)
    assert sum(step.num_preempted for step in world.collector.steps) > 0
