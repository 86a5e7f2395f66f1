"""Modules that are trained whole beside A and B: a classifier that the base does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

# PEFT adds these by itself to what a classification saves, whether the model has them or not.
_PEFTS_OWN = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def modules_to_save(task_type: str, heads: Sequence[str]) -> list[str] | None:
    """Return what ``LoraConfig`` is to be told, so that each head is named once in the end."""
    named = [head for head in heads if head not in _PEFTS_OWN.get(task_type, ())]
    return named or None


def widen_heads(wrapped: nn.Module) -> None:
    """Keep PEFT's trainable copies of whole modules in float32, whatever the base's dtype.

    An optimizer's steps are lost in bfloat16: they are smaller than half a unit in the last place.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save["default"].float()
            copy.register_forward_pre_hook(_widen)


def _widen(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hand over floating-point tensors in float32."""
    return tuple(
        arg.float() if hasattr(arg, "is_floating_point") and arg.is_floating_point() else arg
        for arg in args
    )
