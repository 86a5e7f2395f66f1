"""What the engine that servers run makes of a text with an adapter from a registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.server.conftest import EngineWorld

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.registry import Registry


def served_logprobs(
    base: Path, registry: Registry, name: str, tokens: Sequence[int], model: Any
) -> torch.Tensor:
    """Return the log probabilities of every token after each of ``tokens`` but the last.

    They are the logits but for one number a row, which a softmax does not see.

    Args:
        base: folder of the base.
        registry: has the adapter ``name``, which is loaded from there as a server does.
        tokens: a prompt.
        model: the base, loaded; the engine changes its layers.

    Returns:
        float32 [tokens - 1, vocab].
    """
    world = EngineWorld(base, registry, model=model)
    try:
        vocab = model.config.vocab_size
        asked = world.submit(tokens, name, max_tokens=1, prompt_logprobs=vocab)
        _, finish, error = world.collector.wait(asked)
        assert error is None
        assert finish is not None
    finally:
        world.close()
    found = torch.full((len(tokens) - 1, vocab), torch.nan)
    for row, position in zip(found, finish.prompt_logprobs[1:], strict=True):
        for token, value in position.top:
            row[token] = value
    return found
