"""Log probabilities of a mixed batch beside PEFT's, for bases and adapters that round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.server.conftest import EngineWorld

PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44], [90], [17, 18, 19, 20]]
NAMES = ["alpha", "", "echo", "foxtrot"]


def check_logprobs(
    world: EngineWorld,
    adapters: dict[str, Path],
    load: Callable[[], Any],
    tolerance: float,
    *,
    prompts: Sequence[list[int]] = PROMPTS,
    names: Sequence[str] = NAMES,
) -> None:
    """Ask every prompt of its adapter at once; compare with PEFT over what ``load`` returns."""
    from peft import PeftModel

    ids = [
        world.submit(p, n, logprobs=0, max_tokens=6, ignore_eos=True)
        for p, n in zip(prompts, names, strict=True)
    ]
    for request_id, name, prompt in zip(ids, names, prompts, strict=True):
        found = world.collector.logprobs(request_id)
        tokens, _, _ = world.collector.wait(request_id)
        model = load()
        if name:
            model = PeftModel.from_pretrained(model, str(adapters[name])).eval()
        with torch.inference_mode():
            text = torch.tensor([[*prompt, *tokens]], device=model.device)
            logits = model(text).logits[0].float()
        logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 :]
        expected = [float(logprobs[i, token]) for i, token in enumerate(tokens)]
        assert found == pytest.approx(expected, abs=tolerance), name or "base"
