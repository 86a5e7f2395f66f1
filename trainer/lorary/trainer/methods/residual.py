"""PiSSA and OLoRA: A and B start as a part of W, and W begins without that part.

Semantics: ``y = (W − s B₀ A₀) x + s B A x`` with B = B₀ and A = A₀ at first, so that nothing changes. PEFT
subtracts s B₀ A₀ from the base in memory, and rounds it to the base's dtype there. Here it is a shift
beside the untouched base, the same computation, which leaves nothing to convert back (``shift``).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lorary.trainer.methods.method import ADAPTER, check_rank, lora_layers
from lorary.trainer.methods.shift import Factors, Shifted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Residual(Shifted):
    """A method whose A and B start as a part of W."""

    def start(self) -> None:
        """Set A, B and the shift of every layer.

        Raises:
            InvalidRecipe: the rank is above the width of a layer, which has no more directions.
        """
        import torch
        from peft.utils import transpose

        super().start()
        self._shifts: dict[str, Factors] = {}
        with torch.no_grad():
            for name, layer in lora_layers(self.model).items():
                weight = transpose(layer.get_base_layer().weight, layer.fan_in_fan_out).float()
                scale, rank = layer.scaling[ADAPTER], layer.r[ADAPTER]
                check_rank(name, rank, weight)
                b, a = self.part(weight, rank, scale)
                layer.lora_B[ADAPTER].weight.copy_(b)
                layer.lora_A[ADAPTER].weight.copy_(a)
                first = layer.lora_A[ADAPTER].weight
                self._shifts[name] = Factors(-scale * b.to(first), a.to(first))

    @abstractmethod
    def part(self, weight: Tensor, rank: int, scale: float) -> Factors:
        """Return the first B and A of a float32 weight [out, in]."""

    def shift(self, name: str, layer: Any) -> Factors:
        """``−s B₀ A₀``."""
        return self._shifts[name]

    def state(self) -> dict[str, Tensor]:
        """B₀ and A₀, which a singular value decomposition does not give twice on every machine."""
        return {
            f"{name}.{side}": getattr(factors, side)
            for name, factors in self._shifts.items()
            for side in Factors._fields
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])


class Pissa(Residual):
    """PiSSA (arXiv 2404.02948, equations 2 to 4): B₀ = U_r √(S_r / s), A₀ = √(S_r / s) V_rᵀ.

    With ``svd_iterations`` above 0 the decomposition is the randomized one of the paper's section 5.4.
    """

    def part(self, weight: Tensor, rank: int, scale: float) -> Factors:
        """Take the largest singular vectors."""
        import torch

        iterations = self.recipe.svd_iterations
        if iterations:
            u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
            vh = v.t()
        else:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        return Factors(u[:, :rank] * root, root[:, None] * vh[:rank])


class Olora(Residual):
    """OLoRA (arXiv 2406.01775, algorithm 1): B₀ = the first columns of Q, A₀ = the first rows of R.

    As in PEFT the shift is ``s Q_r R_r``: with alpha equal to the rank, all of that part.
    """

    def part(self, weight: Tensor, rank: int, scale: float) -> Factors:
        """Take the first columns of a QR decomposition."""
        import torch

        q, r = torch.linalg.qr(weight)
        return Factors(q[:, :rank], r[:rank])
