"""VeRA (arXiv 2310.11454, equation 2): ``ΔW = Λ_b B Λ_d A`` with random A and B for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.trainer.methods.method import ADAPTER, Attached

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Vera(Attached):
    """Trains a vector d of the rank's length (0.1 at first) and b of the outputs' (0) for every layer.

    A and B are saved with the adapter: drawn anew, they would depend on the version of torch.
    """

    is_fast = False

    def config(self, targets: str | list[str]) -> Any:
        """Return a ``VeraConfig``."""
        import peft

        return peft.VeraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=self.recipe.rank,
            vera_dropout=self.recipe.dropout,
            target_modules=targets,
            layers_to_transform=list(self.recipe.layers_to_transform) or None,
            bias="none",
            save_projection=True,
        )

    def state(self) -> dict[str, Tensor]:
        """The random matrices."""
        tuner = self.model.base_model
        return {"a": tuner.vera_A[ADAPTER], "b": tuner.vera_B[ADAPTER]}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""
        for name, matrix in self.state().items():
            matrix.copy_(tensors[name])
