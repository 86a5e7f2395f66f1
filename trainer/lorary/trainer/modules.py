"""LoRA on any torch module: find what can be adapted, attach, save and load, without a language model.

::

    wrapped = attach_lora(network, rank=4, heads=["classifier"])
    ...                                    # train what requires a gradient, as ever
    save_lora(wrapped, folder)
    again = load_lora(same_network, folder)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.errors import CorruptArtifact, InvalidRecipe, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn


def adaptable_modules(model: nn.Module, *, skip: Sequence[str] = ()) -> list[str]:
    """Return the full names of all linear layers and convolutions, in the model's order.

    Grouped convolutions are left out: a depthwise one has so few weights that A and B are no fewer.

    Args:
        model: any module.
        skip: names of modules to leave out, with all that is in them.
    """
    import torch

    inside = tuple(f"{name}." for name in skip)
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return [
        name
        for name, module in model.named_modules()
        if not f"{name}.".startswith(inside)
        and (
            isinstance(module, torch.nn.Linear)
            or (isinstance(module, convolutions) and module.groups == 1)
        )
    ]


def attach_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    heads: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Any:
    """Wrap ``model`` with a fresh adapter in every linear layer and convolution; the base is frozen.

    ``h = W x + (alpha/rank) B A x`` (Hu et al. 2021, arXiv 2106.09685, §4.1); of a convolution, A is one
    with the same kernel and ``rank`` output channels, and B is a 1×1 convolution. B starts at zero, so
    the wrapped model starts as the base. Batch norms keep the base's statistics also in ``train()``;
    they would change the base otherwise.

    Args:
        model: any module; changed in place, its weights are not.
        rank: of every pair A, B.
        alpha: scale times rank; twice the rank by default.
        heads: names of modules to train whole and save with the adapter.
        skip: names of modules to leave as they are.

    Returns:
        PEFT's wrapper; it is called as the model was.

    Raises:
        InvalidRecipe: nothing is there to adapt, or a name is not in the model.
        MissingDependency: peft is not installed.
    """
    import torch

    peft = _peft()
    known = dict(model.named_modules())
    unknown = [name for name in (*heads, *skip) if name not in known]
    if unknown:
        raise InvalidRecipe(
            f"the model has no module '{unknown[0]}'; it has {', '.join(n for n in known if n)}."
        )
    targets = adaptable_modules(model, skip=[*heads, *skip])
    if not targets:
        raise InvalidRecipe("the model has no linear layer or convolution to adapt.")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2.0 * rank if alpha is None else alpha,
        target_modules=targets,
        modules_to_save=list(heads) or None,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_hold)
    return peft.get_peft_model(model, config)


def save_lora(wrapped: Any, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``: A, B and heads, nothing of the base."""
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled template of a model card


def load_lora(model: nn.Module, folder: Path) -> Any:
    """Wrap ``model`` with the adapter in ``folder``, in eval mode.

    Raises:
        CorruptArtifact: the folder is no adapter of this model.
        MissingDependency: peft is not installed.
    """
    peft = _peft()
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise CorruptArtifact(f"'{folder}' is no adapter of this model: {error}") from error


def _hold(module: nn.Module, _args: Any) -> None:
    """Make a batch norm use, and not count, what it has counted."""
    module.training = False


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependency(
            "attaching LoRA needs 'peft', which is not installed. Run: pip install 'lorary[train]'"
        ) from error
    return peft
