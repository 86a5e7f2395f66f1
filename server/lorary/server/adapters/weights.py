"""What a group of linear layers multiplies by, as one of three forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from lorary.server.native.products import PackedLinear


class Weights(Protocol):
    """Weights of the layers of one group; the first of the three forms that is there counts.

    ``packed`` is in the native kernel's layout, biases included; ``weight`` [sum of outs, in] and ``bias`` lie
    side by side; else each of ``layers`` makes its own product.
    """

    @property
    def packed(self) -> PackedLinear | None:
        """All layers' weights and biases, packed."""
        ...

    @property
    def weight(self) -> torch.Tensor | None:
        """All layers' weights, side by side."""
        ...

    @property
    def bias(self) -> torch.Tensor | None:
        """All layers' biases, side by side."""
        ...

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers."""
        ...


@dataclass(frozen=True, slots=True)
class GroupWeights:
    """Weights of one group beside those of the base; ``num_bytes`` is what they take."""

    layers: tuple[nn.Module, ...]
    num_bytes: int
    packed: PackedLinear | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def multiply(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Return x [..., in] times all layers' weights, with their biases: [..., sum of outs]."""
    if weights.packed is not None:
        return weights.packed.linear(x)
    if weights.weight is not None:
        return nn.functional.linear(x, weights.weight, weights.bias)
    outputs = [layer(x) for layer in weights.layers]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
