"""The training loop: transformers' Trainer with a loss over the learned tokens only.

The output head is by far the widest layer (49,152 columns for 576 inputs in smollm2-135m), and prompt
positions need none of it. ``selected_logits`` hands the head only the positions that predict a
learned token; everything else, also what a model does to its logits afterwards, stays the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lorary.errors import TrainingFailed
from lorary.trainer.batches import IGNORED
from lorary.trainer.head import head_reads
from lorary.trainer.methods.weights import load_weights, save_weights
from lorary.trainer.resumable import ResumableTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.utils.data import Dataset, Sampler

    from lorary.trainer.meter import StepMeter
    from lorary.trainer.methods.method import Attached

    Scores = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]
    """Logits [N, C] and targets [N] of a batch; see ``lorary.trainer.kinds``."""


class LoraTrainer(ResumableTrainer):
    """Trainer whose data set is a list of batches, already planned and taken in order.

    Args:
        method: what is trained.
        meter: whose figures go into the log of every step.
        scores: logits and targets of a batch.
        kwargs: of ``ResumableTrainer`` and the Trainer.
    """

    def __init__(
        self, *, method: Attached, meter: StepMeter, scores: Scores, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._method = method
        self._meter = meter
        self._scores = scores
        # The loss is a sum over tokens divided by their number in the whole step.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        """Take the batches as planned."""
        del train_dataset
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean cross entropy of the learned tokens (labels, partners) of one step."""
        logits, targets = self._scores(model, inputs)
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        if num_items_in_batch is None:
            loss = total / targets.numel()
        else:
            # The number is of all processes, and their gradients are averaged, not summed.
            loss = total / num_items_in_batch * self.accelerator.num_processes
        self._check_finite("loss", loss)
        penalty = self._method.penalty() if model.training else None
        if penalty is not None:
            # Once a step, however many passes it has.
            loss = loss + penalty / self.args.gradient_accumulation_steps
        return (loss, {"loss": loss}) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm before clipping; one that is not finite would spoil every weight."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite("gradient norm", torch.as_tensor(norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step with its speed and memory."""
        if "loss" in logs:
            logs |= self._meter.figures
        super().log(logs, start_time)

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise TrainingFailed(
                f"the {what} is {value.item()} at step {self.state.global_step + 1}. Lower "
                "training.learning_rate (now at "
                f"{self.args.learning_rate:g}) or method.alpha, or set training.dtype=float32."
            )

    def _write_weights(self, draft: Path) -> None:
        """Write what is trained, all of it and nothing else."""
        save_weights(self._method, draft)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Read it back to go on."""
        del model
        load_weights(self._method, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Read it back from the best checkpoint."""
        load_weights(self._method, Path(self.state.best_model_checkpoint))


def selected_logits(
    model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the model, computing logits only where the next token is learned.

    Args:
        model: a causal language model, wrapped by PEFT or not.
        input_ids: int64 [B, T], padded on the right.
        labels: int64 [B, T], not shifted; ``IGNORED`` where nothing is learned.
        position_ids: int64 [B, T], beginning anew with each sample of a packed row.

    Returns:
        Logits [N, vocab] and their target ids [N].
    """
    predicts = labels[:, 1:] != IGNORED  # position t predicts token t + 1
    rows, positions = predicts.nonzero(as_tuple=True)
    with head_reads(model, lambda hidden: hidden[rows, positions].unsqueeze(0)):
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return logits.squeeze(0), labels[rows, positions + 1]
