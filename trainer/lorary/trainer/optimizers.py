"""Which optimizer a recipe names, and what each needs.

All are AdamW (1711.05101). The 8-bit ones keep both moments in blocks of 256 values with a scale each
(2110.02861 §2); the paged ones keep them in memory that the driver moves to the host when the GPU is full
(2305.14314 §3), which only CUDA has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import InvalidRecipe

if TYPE_CHECKING:
    from lorary.trainer.recipe import TrainingRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """What is to be known of an optimizer.

    Attributes:
        optim: what ``TrainingArguments.optim`` calls it.
        state_bytes: of memory for each trained value.
        needs_cuda: whether only a GPU can run it.
    """

    optim: str
    state_bytes: float
    needs_cuda: bool = False


# Two moments: 4 bytes each, or one byte and its share of a block's float32 scale.
_FULL, _EIGHT = 2 * 4.0, 2 * (1 + 4 / 256)
OPTIMIZERS = {
    "adamw": Optimizer(optim="adamw_torch", state_bytes=_FULL),
    "adamw-8bit": Optimizer(optim="adamw_bnb_8bit", state_bytes=_EIGHT),
    "paged-adamw": Optimizer(optim="paged_adamw_32bit", state_bytes=_FULL, needs_cuda=True),
    "paged-adamw-8bit": Optimizer(optim="paged_adamw_8bit", state_bytes=_EIGHT, needs_cuda=True),
}


def check_optimizer(training: TrainingRecipe) -> None:
    """Refuse an optimizer that the recipe's device, already resolved, does not have.

    Raises:
        InvalidRecipe: a paged optimizer without CUDA.
    """
    if OPTIMIZERS[training.optimizer].needs_cuda and not training.device.startswith("cuda"):
        raise InvalidRecipe(
            f"training.optimizer is '{training.optimizer}', which needs CUDA's paged memory, and "
            f"training.device is '{training.device}'. Use adamw or adamw-8bit."
        )
