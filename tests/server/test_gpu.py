"""The same engine on an NVIDIA GPU: run with ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.server.adapters.ops.triton_ops import TritonPool
from tests.conftest import RECIPES, peft_greedy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld

pytestmark = pytest.mark.gpu


def test_mixed_batch_on_the_gpu_equals_peft_on_the_cpu(
    make_world: Callable[..., EngineWorld], tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    world = make_world(model=model.to("cuda"), max_batch=5)
    assert all(isinstance(group.bound, TritonPool) for group in world.lora.groups)
    names = [*RECIPES, ""]
    prompts = [[5 + i, 9, 30 + i, 11] * (1 + i) for i in range(len(names))]
    ids = [world.submit(p, n) for p, n in zip(prompts, names, strict=True)]
    for request_id, name, prompt in zip(ids, names, prompts, strict=True):
        tokens, _, error = world.collector.wait(request_id)
        assert error is None
        assert tokens == peft_greedy(tiny_base, tiny_adapters.get(name), prompt, 12)
