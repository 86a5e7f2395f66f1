"""Put a method onto a loaded base."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lorary.errors import InvalidRecipe
from lorary.trainer.fast_lora import speed_up
from lorary.trainer.heads import widen_heads
from lorary.trainer.methods.adalora import AdaLora
from lorary.trainer.methods.alora import Alora
from lorary.trainer.methods.delta import DeltaLora
from lorary.trainer.methods.eva import Eva
from lorary.trainer.methods.full import Full
from lorary.trainer.methods.loftq import Loftq
from lorary.trainer.methods.method import Attached, Setting
from lorary.trainer.methods.plain import Dora, RsLora
from lorary.trainer.methods.residual import Olora, Pissa
from lorary.trainer.methods.vera import Vera
from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from lorary.trainer.methods.rules import MethodName
    from lorary.trainer.recipe import MethodRecipe

ALL_LINEAR = "all-linear"
# PEFT's rule: the first number after a dotted name.
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
METHODS: Final[Mapping[MethodName, type[Attached]]] = {
    "lora": Attached,
    "qlora": Attached,
    "rslora": RsLora,
    "alora": Alora,
    "dora": Dora,
    "pissa": Pissa,
    "olora": Olora,
    "eva": Eva,
    "loftq": Loftq,
    "lora-fa": Attached,
    "lora-plus": Attached,
    "vera": Vera,
    "adalora": AdaLora,
    "delta-lora": DeltaLora,
    "full": Full,
}


def attach(
    model: PreTrainedModel,
    recipe: MethodRecipe,
    *,
    gradient_checkpointing: bool,
    setting: Setting | None = None,
    is_started: bool = True,
) -> Attached:
    """Wrap ``model`` with a fresh adapter; the base is frozen, what is trained is float32.

    The adapter starts as no change (LoftQ's undoes what quantization did). Draws from torch's global
    generator. Without ``is_started`` its first values are PEFT's, which is enough to weigh it.

    Raises:
        InvalidRecipe: ``target_modules`` match no linear layer of this base, ``layers_to_transform`` names
            a layer without one, or the method cannot start on this data.
    """
    import peft

    keep_unpacked(model)
    setting = setting or Setting()
    method = METHODS[recipe.name](recipe, setting)
    targets = list(recipe.target_modules)
    if ALL_LINEAR in recipe.target_modules:
        targets = linear_names(model, setting.heads)
    _check_layers(model, recipe.layers_to_transform, targets)
    try:
        with quiet_libraries():
            wrapped = peft.get_peft_model(model, method.config(targets))
    except ValueError as error:
        raise InvalidRecipe(
            f"method.target_modules {list(recipe.target_modules)} cannot be trained on this base: "
            f"{error}. It has {', '.join(linear_names(model, setting.heads))}; use those, or {ALL_LINEAR}."
        ) from error
    method.model = wrapped
    method.extend()
    if is_started:
        with quiet_libraries():
            method.start()
    widen_heads(wrapped)
    method.own = tuple(name for name, p in wrapped.named_parameters() if p.requires_grad)
    if gradient_checkpointing:
        # transformers 5.23 renamed it.
        name = "activation_checkpointing_enable"
        enable = getattr(wrapped, name, None) or wrapped.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        wrapped.enable_input_require_grads()
    wrapped.config.use_cache = False
    if method.is_fast:
        speed_up(wrapped)
    return method


def _check_layers(model: PreTrainedModel, wanted: Sequence[int], targets: Sequence[str]) -> None:
    """Refuse numbers of layers in which no module is a target: PEFT leaves them out in silence.

    Of a model without any target PEFT says so itself.
    """
    endings = tuple(f".{target}" for target in targets)
    names = [name for name, _ in model.named_modules() if name.endswith(endings)]
    found = {int(match[1]) for name in names if (match := _LAYER_NUMBER.search(name))}
    missing = sorted(set(wanted) - found)
    if missing and found:
        raise InvalidRecipe(
            f"method.layers_to_transform names {missing}, and this base has modules of method.target_modules "
            f"in layers {min(found)} to {max(found)}. Leave the others out."
        )


def keep_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing nf4 weights anew for inference on CPUs with AVX512-BF16.

    It does so at the first forward in eval mode, and from then on no gradient passes the layer; its way
    back rounds the scales of the blocks, which makes another base of it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
