"""LoRA on a base that is moved by a second product, which is not trained.

Semantics: ``y = W x + F x + s B A x``, where W is the untouched base, quantized or not, and F = ``shift``
a product of thin matrices that a method computes. Moving W itself would give the same y, but then the
base under the adapter were another one: it could not be quantized, not be compared with, not be shared.

What is published is ``ΔW = F + s B A``: a LoRA of the sum of both ranks on the untouched base. Its two
factors are made anew from the singular values of ΔW, because F and s B A may nearly cancel, and large
factors of a small product lose it in half precision.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from lorary.registry.values import product_norm
from lorary.trainer.methods.method import ADAPTER, PREFIX, Attached, lora_layers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lorary.bases import Base
    from lorary.registry.manifest import Method


class Factors(NamedTuple):
    """A product of thin matrices: b [out, k], a [k, in]."""

    b: Tensor
    a: Tensor


class Shifted(Attached, ABC):
    """A method that trains LoRA on a moved base."""

    is_fast = False

    def start(self) -> None:
        """Give every layer the forward with the shift."""
        for name, layer in lora_layers(self.model).items():
            _replace_forward(layer, name, self)
            layer.whole_change = functools.partial(self.change, name, layer)

    @abstractmethod
    def shift(self, name: str, layer: Any) -> Factors | None:
        """Return F of a layer, without a gradient; ``None`` while it is zero."""

    def change(self, name: str, layer: Any) -> Factors:
        """Return ΔW of a layer, F and s B A together."""
        b, a = layer.lora_B[ADAPTER].weight.detach(), layer.lora_A[ADAPTER].weight.detach()
        return stacked(Factors(layer.scaling[ADAPTER] * b, a), self.shift(name, layer))

    def save(self, folder: Path, base: Base) -> float:
        """Write ΔW of every layer as plain LoRA."""
        factors, worst = {}, 0.0
        for name, layer in lora_layers(self.model).items():
            factors[name], error = compact(self.change(name, layer))
            worst = max(worst, error)
        write_lora(self.model, folder, base, factors)
        return worst

    def describe(self) -> Method:
        """The rank is that of what is published."""
        layers = lora_layers(self.model).values()
        widths = (min(layer.in_features, layer.out_features) for layer in layers)
        rank = min(2 * self.recipe.rank, max(widths))
        return dataclasses.replace(super().describe(), rank=rank)


def stacked(first: Factors, second: Factors | None) -> Factors:
    """Return the sum of two products as one."""
    import torch

    if second is None:
        return first
    return Factors(torch.cat([first.b, second.b], 1), torch.cat([first.a, second.a], 0))


def compact(product: Factors) -> tuple[Factors, float]:
    """Return the same product with balanced float32 factors, and what rounding them cost.

    Semantics: with ``b a = U S Vᵀ``, ``b' = U √S`` and ``a' = √S Vᵀ``, computed in double precision from
    two QR decompositions, so that nothing of the size of W is formed. The rank is k, or the smaller side
    of W where that is less.

    Returns:
        The factors, contiguous on the CPU, and ‖b'a' − ba‖ / ‖ba‖.
    """
    import torch

    b, a = product.b.double().cpu(), product.a.double().cpu()
    rank = min(b.shape[1], b.shape[0], a.shape[1])
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    root = s[:rank].sqrt()
    wide_b = q_b @ (u[:, :rank] * root)
    wide_a = (root[:, None] * vh[:rank]) @ q_a.t()
    found = Factors(wide_b.float().contiguous(), wide_a.float().contiguous())
    # b'a' − ba = (b' − b) a' + b (a' − a), whose norm needs no more than its factors.
    lost = product_norm(
        torch.cat([found.b.double() - wide_b, wide_b], 1).numpy(),
        torch.cat([found.a.double(), found.a.double() - wide_a], 0).numpy(),
    )
    size = product_norm(wide_b.numpy(), wide_a.numpy())
    return found, lost / size if size else 0.0


def write_lora(model: Any, folder: Path, base: Base, factors: Mapping[str, Factors]) -> None:
    """Write a PEFT folder in which B A of every module is a product of ``factors``, float32 on the CPU."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    ranks = {}
    for name, found in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = found.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = found.b
        ranks[name] = found.a.shape[0]
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.base_model_name_or_path = base.name
    config.inference_mode = True
    config.init_lora_weights = True
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    for written in folder.iterdir():
        written.chmod(0o644)


def _replace_forward(layer: Any, name: str, method: Shifted) -> None:
    """Give a PEFT LoRA layer the shift; PEFT's own forward stays while the adapter is off."""
    import torch.nn.functional as F

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            result: Tensor = type(self).forward(self, x, *args, **kwargs)
            return result
        y: Tensor = self.base_layer(x, *args, **kwargs)
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        # The two parts may nearly cancel: they are added in the adapter's precision, then rounded.
        wide = x.to(a.weight.dtype)
        change: Tensor = b(a(self.lora_dropout[ADAPTER](wide))) * self.scaling[ADAPTER]
        shift = method.shift(name, self)
        if shift is not None:
            change = change + F.linear(F.linear(wide, shift.a), shift.b)
        return y + change.to(y.dtype)

    layer.forward = types.MethodType(forward, layer)
