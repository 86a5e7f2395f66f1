"""The optimizers that belong to methods: LoRA-FA's and LoRA+'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from lorary.trainer.recipe import Recipe

DEFAULT_LR_RATIO = 16.0
"""Of the learning rates in arXiv 2402.12354, section 5."""


def own_optimizer(model: Any, recipe: Recipe) -> Any:
    """Return the optimizer of LoRA-FA or LoRA+, or ``None`` where the Trainer makes it.

    LoRA-FA (arXiv 2308.03303) freezes every A and steps B along ``g (A Aᵀ)⁻¹ / s²``, the gradient of B
    that comes nearest to the one of the full weight. LoRA+ (arXiv 2402.12354) gives B a learning rate of
    its own.
    """
    import torch
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    method, training = recipe.method, recipe.training
    with quiet_libraries():
        if method.resolved_optimizer == "lora-fa":
            return create_lorafa_optimizer(
                model,
                r=method.rank,
                lora_alpha=method.scaled_alpha,
                lr=training.learning_rate,
                weight_decay=training.weight_decay,
            )
        if method.resolved_optimizer == "lora-plus":
            return create_loraplus_optimizer(
                model,
                torch.optim.AdamW,
                lr=training.learning_rate,
                loraplus_lr_ratio=method.lr_ratio or DEFAULT_LR_RATIO,
                loraplus_weight_decay=training.weight_decay,
            )
    return None
