"""EVA (arXiv 2410.07170, algorithm 1): A starts as the main directions of each layer's inputs.

PEFT computes an incremental singular value decomposition of every layer's inputs, and shares the ranks
out so that they explain most variance. Its loop goes round the batches until all directions have
settled: it is given batches that are large enough to count, and an end.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe
from lorary.trainer.batches import collate
from lorary.trainer.methods.method import ADAPTER, Attached, lora_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorary.registry.manifest import Method
    from lorary.trainer.encoding import Row

_MAX_FORWARDS = 400
_MAX_BATCHES = 64
_MIN_TOKENS = 1024
"""Of a batch, where the data has them: fewer make the directions jump from batch to batch."""


class Eva(Attached):
    """See above; ``rank_spread`` is the paper's ρ."""

    def config(self, targets: str | list[str]) -> Any:
        """Switch it on; B is zero."""
        import peft

        eva = peft.EvaConfig(rho=self.recipe.rank_spread, use_label_mask=False)
        return self.lora_config(targets, init_lora_weights="eva", eva_config=eva)

    def start(self) -> None:
        """Look at the inputs that the training rows give, and set A and the ranks.

        Raises:
            InvalidRecipe: too few training tokens, or too narrow layers, for this rank; or the
                directions did not settle.
        """
        from peft.tuners.lora import initialize_lora_eva_weights

        needed = round(self.recipe.rank * self.recipe.rank_spread)
        narrowest = min(layer.in_features for layer in lora_layers(self.model).values())
        if needed > narrowest:
            raise InvalidRecipe(
                f"method.rank times method.rank_spread is {needed}, and a layer of this base has only "
                f"{narrowest} inputs; lower one of them."
            )
        batches = _batches(self.setting.rows, max(_MIN_TOKENS, 2 * needed))
        if not batches or min(int(batch["lengths"].sum()) for batch in batches) < needed:
            raise InvalidRecipe(
                f"EVA at method.rank {self.recipe.rank} needs {needed} tokens of training data or more, "
                "for as many directions; lower the rank, or add data."
            )
        # In eval mode PEFT would leave the adapter's own dropout out as well; B is zero here anyway.
        initialize_lora_eva_weights(
            self.model,
            dataloader=batches,
            forward_fn=_bounded_forward(),
            prepare_model_inputs_fn=lambda inputs, _config: _positions(inputs),
            show_progress_bar=False,
        )
        # The values are final and the ranks are in rank_pattern: loading must not begin anew.
        config = self.model.peft_config[ADAPTER]
        config.init_lora_weights, config.eva_config = True, None

    def describe(self) -> Method:
        """The rank is the largest that a layer was given."""
        rank = max(layer.r[ADAPTER] for layer in lora_layers(self.model).values())
        return dataclasses.replace(super().describe(), rank=rank)


def _bounded_forward() -> Callable[[Any, dict[str, Tensor]], None]:
    """Return PEFT's ``forward_fn``, which ends a loop that would not end."""
    left = itertools.count(_MAX_FORWARDS, -1)

    def forward(model: Any, inputs: dict[str, Tensor]) -> None:
        if next(left) <= 0:
            raise InvalidRecipe(
                f"EVA's directions have not settled in {_MAX_FORWARDS} batches. Lower method.rank or "
                "method.rank_spread, or add data."
            )
        ids = {name: tensor for name, tensor in inputs.items() if name != "lengths"}
        model(**ids, use_cache=False, logits_to_keep=1)

    return forward


def _batches(rows: Sequence[Row], num_tokens: int) -> list[dict[str, Tensor]]:
    """Group rows in random order into batches of about ``num_tokens`` tokens; not more than will be read.

    Returns:
        What the model takes (``input_ids`` int64 [B, T]), and ``lengths`` int64 [B], of each batch.
    """
    import torch

    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    taken: list[Row] = []
    total = 0
    for index in order:
        if total >= _MAX_BATCHES * num_tokens:
            break
        taken.append(rows[index])
        total += len(taken[-1].input_ids)
    count = max(1, total // num_tokens)
    size = math.ceil(len(taken) / count) if taken else 1
    groups = [taken[i : i + size] for i in range(0, len(taken), size)]
    if len(groups) > 1 and len(groups[-1]) < size:
        groups[-2] += groups.pop()
    batches = []
    for group in groups:
        batch = collate(group, 0)
        del batch["labels"]
        batch["lengths"] = torch.tensor([len(row.input_ids) for row in group])
        batches.append(batch)
    return batches


def _positions(inputs: dict[str, Tensor]) -> Tensor:
    """Return the places of tokens that are no padding, [N, 2]."""
    import torch

    width, lengths = inputs["input_ids"].shape[1], inputs["lengths"]
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).nonzero()
