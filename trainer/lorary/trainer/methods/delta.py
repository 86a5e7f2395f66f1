"""Delta-LoRA (arXiv 2309.02411, algorithm 1): the base moves with the product of A and B.

The paper's step, with t counted from 1: AdamW on A and B, then, if t > K,

    W ← W + λ s (B_t A_t − B_{t−1} A_{t−1}),

with no gradient and no moments for W. Its terms telescope: after step t

    W_t = W_0 + λ s (B_t A_t − B_K A_K).

So W need not be written: the moved base is W_0 and a product of rank 2 r, of which no gradient is taken
(``shift``), which holds on quantized bases, too. What is published is

    ΔW = s [(1 + λ) B_T A_T − λ B_K A_K].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.trainer.methods.method import ADAPTER, lora_layers
from lorary.trainer.methods.shift import Factors, Shifted, stacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DEFAULT_RATIO = 0.5


class DeltaLora(Shifted):
    """See above; ``delta_start`` is K and ``delta_ratio`` is λ."""

    def start(self) -> None:
        """Take B_0 A_0 where K is 0."""
        super().start()
        self._ratio = self.recipe.delta_ratio or DEFAULT_RATIO
        self._at_start: dict[str, Factors] = {}
        self.after_step(0)

    def after_step(self, step: int) -> None:
        """Keep B_K A_K; from then on the base moves."""
        if step == self.recipe.delta_start:
            self._at_start = {
                name: Factors(*(factor.clone() for factor in _current(layer)))
                for name, layer in lora_layers(self.model).items()
            }

    def shift(self, name: str, layer: Any) -> Factors | None:
        """``λ s (B_t A_t − B_K A_K)``."""
        import torch

        if name not in self._at_start:
            return None
        now, then = _current(layer), self._at_start[name]
        factor = self._ratio * layer.scaling[ADAPTER]
        return Factors(torch.cat([factor * now.b, -factor * then.b], 1), torch.cat([now.a, then.a]))

    def change(self, name: str, layer: Any) -> Factors:
        """``s [(1 + λ) B_T A_T − λ B_K A_K]``: B_T A_T is in both parts, and counted once."""
        now, scale = _current(layer), layer.scaling[ADAPTER]
        if name not in self._at_start:
            return Factors(scale * now.b, now.a)
        then = Factors(-self._ratio * scale * self._at_start[name].b, self._at_start[name].a)
        return stacked(Factors((1 + self._ratio) * scale * now.b, now.a), then)

    def state(self) -> dict[str, Tensor]:
        """B_K and A_K, once there are any."""
        return {
            f"{name}.{side}": getattr(factors, side)
            for name, factors in self._at_start.items()
            for side in Factors._fields
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back; a checkpoint of a step before K has none."""
        self._at_start = {}
        if tensors:
            for name, layer in lora_layers(self.model).items():
                like = layer.lora_A[ADAPTER].weight
                sides = (tensors[f"{name}.{side}"].to(like) for side in Factors._fields)
                self._at_start[name] = Factors(*sides)


def _current(layer: Any) -> Factors:
    """Return B and A as they are, without a gradient."""
    return Factors(layer.lora_B[ADAPTER].weight.detach(), layer.lora_A[ADAPTER].weight.detach())
