"""AdaLoRA (arXiv 2303.10512): ``ΔW = P Λ Q``, and the least important triplets are taken away.

``rank`` is the rank at the start and ``target_rank`` the mean in the end. As in the paper's section 4 the
ranks stay for a tenth of the steps, fall with the cube of what is left, and stay for the last third.
P and Q are kept near orthogonal by a penalty in the loss (equation 4, γ = 0.5 as in PEFT), which PEFT adds
only where the model computes the loss; this trainer's loop does that itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.trainer.methods.method import ADAPTER, Attached
from lorary.trainer.output import save_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lorary.bases import Base

_BEFORE, _AFTER = 1 / 10, 1 / 3


class AdaLora(Attached):
    """See above."""

    is_fast = False

    def config(self, targets: str | list[str]) -> Any:
        """Return an ``AdaLoraConfig`` with its schedule."""
        import peft

        steps = self.setting.max_steps
        return peft.AdaLoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            init_r=self.recipe.rank,
            target_r=self.recipe.resolved_target_rank,
            tinit=int(steps * _BEFORE),
            tfinal=int(steps * _AFTER),
            deltaT=max(1, steps // 100),
            total_step=steps,
            lora_alpha=self.recipe.scaled_alpha,
            lora_dropout=self.recipe.dropout,
            target_modules=targets,
            layers_to_transform=list(self.recipe.layers_to_transform) or None,
            bias="none",
        )

    def penalty(self) -> Tensor:
        """``γ`` times the mean of ``‖PᵀP − I‖`` and ``‖QQᵀ − I‖`` (Frobenius) over all layers."""
        import torch

        distances = []
        for name in self.own:
            if ".lora_A." in name or ".lora_B." in name:
                matrix = self.model.get_parameter(name)
                gram = matrix @ matrix.t() if ".lora_A." in name else matrix.t() @ matrix
                distances.append(torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)))
        weight: float = self.model.peft_config[ADAPTER].orth_reg_weight
        return weight * torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        """Weigh the triplets by their gradients, and take away what is beyond the budget."""
        self.model.base_model.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """What the allocator has averaged, and which triplets it has kept."""
        import torch

        allocator = self.model.base_model.rankallocator
        kept = self.model.peft_config[ADAPTER].rank_pattern or {}
        return {
            **{f"importance/{name}": value for name, value in allocator.exp_avg_ipt.items()},
            **{f"uncertainty/{name}": value for name, value in allocator.exp_avg_unc.items()},
            **{f"kept/{name}": torch.tensor(flags) for name, flags in kept.items()},
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put it back."""
        allocator = self.model.base_model.rankallocator
        groups: dict[str, dict[str, Tensor]] = {"importance": {}, "uncertainty": {}, "kept": {}}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = value.to(self.model.device)
        allocator.exp_avg_ipt, allocator.exp_avg_unc = groups["importance"], groups["uncertainty"]
        # Only asked for its names: the values are computed anew at every step.
        allocator.ipt = dict(groups["importance"])
        self.model.peft_config[ADAPTER].rank_pattern = {
            name: flags.tolist() for name, flags in groups["kept"].items()
        } or None

    def save(self, folder: Path, base: Base) -> float:
        """Write all triplets, of which those taken away are zero: a layer may have none left.

        The registry leaves them out of the LoRA that it makes of this.
        """
        config = self.model.peft_config[ADAPTER]
        kept, config.rank_pattern = config.rank_pattern, None
        try:
            save_adapter(self.model, folder, base)
        finally:
            config.rank_pattern = kept
        return 0.0
