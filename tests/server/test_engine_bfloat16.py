"""The engine in bfloat16 where its layers run natively: what is rounded, and what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorary.server.native import library as native
from tests.server.test_engine_oracle import prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld

LARGEST = 65504.0
"""Of float16."""


@pytest.fixture(autouse=True)
def needs_bfloat16() -> None:
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.supports_layers(torch.bfloat16):
        pytest.skip("this CPU does not multiply bfloat16")


def test_logprobs_are_near_those_of_float32_layers(
    make_world: Callable[..., EngineWorld], tiny_base: Path
) -> None:
    """Of the same weights, adapters included: within the rounding of one bfloat16 number."""
    rounded = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    worlds = [make_world(dtype=torch.bfloat16), make_world(model=rounded.float())]
    found = []
    for world in worlds:
        ids = [
            world.submit(p, name, labels=((5, 9, 30, 44), (7,)))
            for p, name in zip(prompts(4), ["", "bravo", "", "bravo"], strict=True)
        ]
        finishes = [world.collector.wait(i)[1] for i in ids]
        found.append(torch.tensor([f.label_logprobs for f in finishes if f is not None]))
    assert worlds[0].fused is not None
    assert found[0].shape == (4, 2)
    assert (found[0] - found[1]).abs().max() < found[1].abs().max() / 256


def test_keys_and_values_beyond_float16_are_cut_off(
    make_world: Callable[..., EngineWorld], tiny_base: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e6
        layer.self_attn.o_proj.weight.data *= 1e-6
    world = make_world(model=model, dtype=torch.bfloat16)
    cache = world.engine._cache
    assert cache.k.dtype == cache.v.dtype == torch.float16
    scores = world.collector.logprobs(world.submit(prompts(1)[0], logprobs=0, ignore_eos=True))
    assert cache.v.abs().max() == LARGEST
    assert torch.tensor(scores).isfinite().all()
