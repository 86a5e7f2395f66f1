"""Put a low-rank method onto a loaded base: LoRA on a whole one, QLoRA on a quantized one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe
from lorary.registry.manifest import Method
from lorary.trainer.fast_lora import speed_up
from lorary.trainer.heads import modules_to_save, widen_heads
from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from lorary.trainer.recipe import MethodRecipe

ALL_LINEAR = "all-linear"


def attach(
    model: PreTrainedModel,
    recipe: MethodRecipe,
    *,
    gradient_checkpointing: bool,
    task_type: str = "CAUSAL_LM",
    heads: Sequence[str] = (),
) -> Any:
    """Wrap ``model`` with a fresh adapter; the base is frozen, A and B are float32.

    B starts at zero, so the adapter starts as no change. Draws from torch's global generator.

    Args:
        model: a loaded base.
        recipe: what to attach.
        gradient_checkpointing: recompute activations in the backward pass.
        task_type: name of the ``peft.TaskType``.
        heads: full names of modules that are trained whole, in float32, and saved with the adapter.

    Raises:
        InvalidRecipe: ``target_modules`` match no linear layer of this base.
    """
    import peft

    targets: str | list[str] = list(recipe.target_modules)
    if ALL_LINEAR in recipe.target_modules:
        targets = linear_names(model, heads)
    config = peft.LoraConfig(
        task_type=peft.TaskType[task_type],
        modules_to_save=modules_to_save(task_type, heads),
        r=recipe.rank,
        lora_alpha=recipe.scaled_alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        bias="none",
    )
    try:
        with quiet_libraries():
            wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise InvalidRecipe(
            f"method.target_modules {list(recipe.target_modules)} cannot be trained on this base: "
            f"{error}. It has {', '.join(linear_names(model, heads))}; use those, or {ALL_LINEAR}."
        ) from error
    if gradient_checkpointing:
        # transformers 5.23 renamed it.
        name = "activation_checkpointing_enable"
        enable = getattr(wrapped, name, None) or wrapped.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        wrapped.enable_input_require_grads()
    wrapped.config.use_cache = False
    widen_heads(wrapped)
    speed_up(wrapped)
    return wrapped


def linear_names(model: PreTrainedModel, heads: Sequence[str] = ()) -> list[str]:
    """Return the last names of all linear layers but the output head, quantized ones included.

    Those of ``heads`` are left out, too; PEFT keeps away from them though a last name may be the same.
    """
    import torch

    output = model.get_output_embeddings()
    inside = tuple(f"{head}." for head in heads)
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not output
        and not f"{name}.".startswith(inside)
    }
    return sorted(names)


def describe(wrapped: Any, recipe: MethodRecipe) -> Method:
    """Return the manifest's account of the method."""
    config = wrapped.peft_config["default"]
    return Method(
        name=recipe.name,
        rank=recipe.rank,
        alpha=recipe.scaled_alpha,
        target_modules=tuple(sorted(config.target_modules)),
    )
