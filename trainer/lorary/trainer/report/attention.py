"""What an adapter does to attention: maps of the same prompt before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_TOKENS = 256
"""Of a prompt: the maps of all layers grow with the square of its length."""
NUM_SHOWN = 28
"""Tokens of a map, the last ones of the prompt: what the answer is chosen from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChange:
    """One prompt's attention, without and with the adapter.

    Attributes:
        tokens: the last ``NUM_SHOWN`` of the prompt, as text.
        layer: the one that changes most.
        before: that layer's attention, mean over heads, float32 [shown, shown]; what of a row's sum is
            missing went to earlier tokens.
        after: the same with the adapter.
        moved: float32 [layers, heads], see ``total_variation``.
    """

    tokens: tuple[str, ...]
    layer: int
    before: Tensor
    after: Tensor
    moved: Tensor


@torch.inference_mode()
def attention_changes(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]
) -> list[AttentionChange]:
    """Read each prompt twice, with the adapter and without.

    Args:
        model: wrapped by PEFT, a language model whose attention can be eager.
        tokenizer: to show the tokens.
        prompts: token ids, at most ``MAX_TOKENS`` each.

    Returns:
        One entry per prompt; none for a model that keeps no attention maps (state-space models).
    """
    if not prompts:
        return []
    base = model.get_base_model()
    attention, was_training = model.config._attn_implementation, model.training
    model.eval()
    try:
        with quiet_libraries():
            base.set_attn_implementation("eager")  # the one that returns its weights
            found = [_change(model, tokenizer, prompt) for prompt in prompts]
    finally:
        base.set_attn_implementation(attention)
        model.train(was_training)
    return [one for one in found if one is not None]


def total_variation(before: Tensor, after: Tensor) -> Tensor:
    """Return the share of attention that went elsewhere: ½ Σ |after - before|, mean over positions.

    Args:
        before: [..., T, T], rows adding up to 1.
        after: the same.

    Returns:
        [...], between 0 (the same) and 1 (nothing is looked at that was looked at before).
    """
    return 0.5 * (after - before).abs().sum(dim=-1).mean(dim=-1)


def _change(model: Any, tokenizer: Any, prompt: Sequence[int]) -> AttentionChange | None:
    after = _maps(model, prompt)
    with model.disable_adapter():
        before = _maps(model, prompt)
    if before is None or after is None:
        return None
    moved = total_variation(before, after)
    layer = int(moved.mean(dim=1).argmax())
    shown = [tokenizer.decode([token]) for token in prompt[-NUM_SHOWN:]]
    return AttentionChange(
        tokens=tuple(shown),
        layer=layer,
        before=before[layer].mean(dim=0)[-NUM_SHOWN:, -NUM_SHOWN:],
        after=after[layer].mean(dim=0)[-NUM_SHOWN:, -NUM_SHOWN:],
        moved=moved,
    )


def _maps(model: Any, prompt: Sequence[int]) -> Tensor | None:
    """Return float32 [layers, heads, T, T] on the CPU."""
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model(input_ids=ids, output_attentions=True, use_cache=False)
    maps = [one for one in (getattr(output, "attentions", None) or ()) if one is not None]
    if not maps:
        return None
    return torch.stack([one[0].float().cpu() for one in maps])
