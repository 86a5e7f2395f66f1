"""Full fine-tuning: the weights themselves are learned, and the best low-rank part of their change is kept.

Semantics: ``y = W' x + bias``, where W' [out, in] starts as the base's W. W' is float32 whatever the base's
dtype, because a step of an optimizer is smaller than what bfloat16 can tell apart, and is rounded to the
base's dtype for its products. W stays beside it: with the adapter off the base is the base, and
ΔW = W' − W is known.

What is published is the rank r that comes nearest to ΔW = U S Vᵀ (Eckart and Young, *The approximation of one
matrix by another of lower rank*, Psychometrika 1, 1936):

    B = U_r √S_r,    A = √S_r V_rᵀ,    ‖ΔW − B A‖² = Σ_{i>r} σᵢ².
"""

from __future__ import annotations

import dataclasses
import types
from typing import TYPE_CHECKING, Any, NamedTuple

from lorary.errors import InvalidRecipe
from lorary.trainer.methods.method import ADAPTER, Attached, lora_layers
from lorary.trainer.methods.shift import Factors, write_lora

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lorary.bases import Base
    from lorary.registry.manifest import Method

_TRAINED = "trained_weight"


class Spectrum(NamedTuple):
    """What was learned of a module, and how much of it is published.

    Attributes:
        values: all singular values of ΔW, falling.
        rank: how many of them are published.
    """

    values: tuple[float, ...]
    rank: int


class Full(Attached):
    """Trains W' while it fits; ``cut`` leaves plain LoRA layers that hold what is published."""

    is_fast = False
    is_cut_afterwards = True

    def extend(self) -> None:
        """Give every layer its W'; A and B wait, frozen, for what will be published.

        Raises:
            InvalidRecipe: a target is no linear layer.
        """
        import torch
        from peft.tuners.lora import Linear

        self._worst = 0.0
        for name, layer in lora_layers(self.model).items():
            if not isinstance(layer, Linear):
                kind = type(layer.get_base_layer()).__name__
                raise InvalidRecipe(
                    f"method.target_modules names {name}, which is no linear layer ({kind}), and full "
                    "learns the weights of those. Leave it out."
                )
            layer.requires_grad_(False)
            weight = _weight(layer)
            wide = torch.promote_types(weight.dtype, torch.float32)
            layer.register_parameter(
                _TRAINED, torch.nn.Parameter(weight.detach().to(wide, copy=True).contiguous())
            )
            layer.forward = types.MethodType(_forward, layer)

    def cut(self) -> None:
        """Put the best A and B into every layer and drop W'; what is left is PEFT's own LoRA.

        Every layer then has a ``spectrum``.
        """
        import torch

        for layer in lora_layers(self.model).values():
            with torch.no_grad():
                change = getattr(layer, _TRAINED).double() - _weight(layer).double()
                found, values, error = best_of_rank(change, self.recipe.rank)
            rank = len(found.a)
            for linear, factor in ((layer.lora_A, found.a), (layer.lora_B, found.b)):
                linear[ADAPTER].weight = torch.nn.Parameter(factor, requires_grad=False)
            layer.r[ADAPTER] = layer.lora_alpha[ADAPTER] = rank
            layer.scaling[ADAPTER] = 1.0
            layer.spectrum = Spectrum(tuple(values.tolist()), rank)
            delattr(layer, _TRAINED)
            del layer.forward
            self._worst = max(self._worst, error)
        self.own = ()

    def save(self, folder: Path, base: Base) -> float:
        """Write A and B of every layer, as ``cut`` left them."""
        factors = {
            name: Factors(
                *(side[ADAPTER].weight.detach().cpu() for side in (layer.lora_B, layer.lora_A))
            )
            for name, layer in lora_layers(self.model).items()
        }
        write_lora(self.model, folder, base, factors)
        return self._worst

    def describe(self) -> Method:
        """The rank is that of what is published, and its scale is 1."""
        rank = max(layer.r[ADAPTER] for layer in lora_layers(self.model).values())
        return dataclasses.replace(super().describe(), rank=rank, alpha=float(rank))


def best_of_rank(change: Tensor, rank: int) -> tuple[Factors, Tensor, float]:
    """Return the product of a rank that comes nearest to a matrix.

    Args:
        change: [out, in], float64.
        rank: of the product; the smaller side of the matrix where that is less.

    Returns:
        b [out, k] and a [k, in], balanced and float32; all singular values, falling; and
        ‖b a − change‖ / ‖change‖, rounding to float32 included (0 for a matrix of zeros).
    """
    import torch

    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    b = (u[:, :rank] * root).float().contiguous()
    a = (root[:, None] * vh[:rank]).float().contiguous()
    size = float(s.norm())
    error = float((b.double() @ a.double() - change).norm()) / size if size else 0.0
    return Factors(b, a), s, error


def _weight(layer: Any) -> Tensor:
    """Return W [out, in] of a PEFT layer."""
    from peft.utils import transpose

    weight: Tensor = transpose(layer.get_base_layer().weight, layer.fan_in_fan_out)
    return weight


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Multiply with W'; with the adapter off, PEFT's own forward."""
    import torch.nn.functional as F

    if self.disable_adapters:
        result: Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    return F.linear(x, getattr(self, _TRAINED).to(x.dtype), self.get_base_layer().bias)
