"""What a method has to answer while it trains. The answers here are those of plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe
from lorary.registry.manifest import Method
from lorary.trainer.heads import modules_to_save
from lorary.trainer.output import save_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lorary.bases import Base
    from lorary.trainer.encoding import Row
    from lorary.trainer.recipe import MethodRecipe

ADAPTER = "default"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a method may want to know of the run, beside its own recipe.

    Attributes:
        base: where the base's whole weights are; LoftQ reads them.
        rows: the training rows; EVA reads some.
        max_steps: optimizer steps of the whole run; AdaLoRA plans with them.
        task_type: name of the ``peft.TaskType``.
        invocation: aLoRA's tokens.
        heads: full names of modules that are trained whole, in float32, and saved with the adapter.
    """

    base: Base | None = None
    rows: Sequence[Row] = ()
    max_steps: int = 1
    task_type: str = "CAUSAL_LM"
    invocation: tuple[int, ...] = ()
    heads: tuple[str, ...] = ()


class Attached:
    """An adapter on a base.

    Args:
        recipe: of the method.
        setting: of the run.

    Attributes:
        model: the base as PEFT wrapped it; set by ``attach``.
        own: names of the adapter's parameters in ``model``, frozen ones included; set by ``attach``.
        is_fast: whether ``fast_lora`` may replace PEFT's forward.
        is_cut_afterwards: whether what is published is less than what was trained: see ``cut``.
    """

    is_fast = True
    is_cut_afterwards = False

    def __init__(self, recipe: MethodRecipe, setting: Setting) -> None:
        self.recipe = recipe
        self.setting = setting
        self.model: Any = None
        self.own: tuple[str, ...] = ()

    def config(self, targets: str | list[str]) -> Any:
        """Return PEFT's configuration."""
        return self.lora_config(targets)

    def lora_config(self, targets: str | list[str], **changes: Any) -> Any:
        """Return a ``LoraConfig`` of the recipe's size."""
        import peft

        return peft.LoraConfig(
            task_type=peft.TaskType[self.setting.task_type],
            modules_to_save=modules_to_save(self.setting.task_type, self.setting.heads),
            r=self.recipe.rank,
            lora_alpha=self.recipe.scaled_alpha,
            lora_dropout=self.recipe.dropout,
            target_modules=targets,
            layers_to_transform=list(self.recipe.layers_to_transform) or None,
            bias="none",
            **changes,
        )

    def extend(self) -> None:
        """Add parameters that PEFT does not know; called once, before ``start``, also on torch's ``meta`` device."""

    def start(self) -> None:
        """Set first values other than PEFT's; called once, when ``model`` is there."""

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of a step, or nothing."""
        return None

    def after_step(self, step: int) -> None:
        """Do what follows the optimizer's ``step``-th step (from 1); gradients are still there."""

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs beside the adapter's parameters."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""

    def cut(self) -> None:
        """Bring ``model`` from what was trained to what is published, where they differ; nothing is trained after."""

    def save(self, folder: Path, base: Base) -> float:
        """Write a PEFT folder that computes, on the untouched base, what was trained.

        Returns:
            The largest ‖ΔW' − ΔW‖ / ‖ΔW‖ of a module that writing it cost: 0 where nothing is converted.
        """
        save_adapter(self.model, folder, base)
        return 0.0

    def describe(self) -> Method:
        """Return the manifest's account of the method."""
        config = self.model.peft_config[ADAPTER]
        return Method(
            name=self.recipe.name,
            rank=self.recipe.rank,
            alpha=self.recipe.scaled_alpha,
            target_modules=tuple(sorted(config.target_modules)),
        )


def check_rank(name: str, rank: int, weight: Tensor) -> None:
    """Refuse to take more directions of a weight [out, in] than it has.

    Raises:
        InvalidRecipe: naming the layer.
    """
    if rank > min(weight.shape):
        raise InvalidRecipe(
            f"method.rank is {rank}, and {name} of this base is {weight.shape[0]} x {weight.shape[1]}: it "
            f"has {min(weight.shape)} directions to start from. Lower the rank, or leave the layer out of "
            "method.target_modules."
        )


def lora_layers(model: Any) -> dict[str, Any]:
    """Return PEFT's LoRA layers of a wrapped model by the names that the base has for them."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
