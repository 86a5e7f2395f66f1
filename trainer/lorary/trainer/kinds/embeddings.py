"""One vector for a text, so that a text and its partner are near: contrastive learning with in-batch negatives.

The vector is the mean of the last hidden states over the text's tokens, of length 1. The loss is InfoNCE
(van den Oord et al. 2018, arXiv 1807.03748, eq. 4) with the other rows' partners as negatives (Henderson
et al. 2017, arXiv 1705.00652, §4.4)::

    loss_i = −log( exp(a_i·p_i / τ) / Σ_j exp(a_i·p_j / τ) ),   τ = 0.05

A ``negative`` input, if the data has one, is one more p_j for every row of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from lorary.errors import InvalidRecipe
from lorary.trainer.evaluate import Evaluation
from lorary.trainer.kinds.text_kind import TextKind
from lorary.trainer.metrics import mean_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorary.trainer.examples import Example

TEMPERATURE = 0.05
NEGATIVE = "negative"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """A text, its partner, and perhaps a text that looks like a partner and is none."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    negative: tuple[int, ...] = ()


class Embeddings(TextKind):
    """``embeddings``: measured by finding each held-out text's partner among all held-out partners."""

    peft_task: ClassVar[str] = "FEATURE_EXTRACTION"
    auto_class: ClassVar[str] = "AutoModel"

    def row(self, example: Example) -> PairRow:
        """Tokenize a text by the template, its partner and its negative as they are."""
        if self.recipe.training.batch_size < 2:
            raise InvalidRecipe(
                "training.batch_size is 1; embeddings learn from the other rows of a batch. Use 16."
            )
        negative = example.inputs.get(NEGATIVE, "")
        return PairRow(
            input_ids=self.source_ids(example),
            labels=self.text_ids(example.target),
            negative=self.text_ids(negative) if negative else (),
        )

    def load(self, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        """Load the bare body; a pooler over the first token is no part of a mean."""
        model, heads = super().load(dtype)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        return model, tuple(name for name in heads if not name.startswith("pooler"))

    def collate(self, rows: Sequence[PairRow]) -> dict[str, Tensor]:
        """Pad texts, partners and negatives apart; ``labels`` [B] are the rows' own partners."""
        batch = self.padded([row.input_ids for row in rows])
        others = [row.labels for row in rows] + [row.negative for row in rows if row.negative]
        batch |= {f"partner_{name}": value for name, value in self.padded(others).items()}
        return {**batch, "labels": torch.arange(len(rows))}

    def scores(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return similarities over the temperature [B, partners + negatives]."""
        partner_ids, own = batch["partner_input_ids"], batch["labels"]
        texts = mean_vectors(model, batch["input_ids"], batch["attention_mask"])
        partners = mean_vectors(model, partner_ids, batch["partner_attention_mask"])
        logits = texts @ partners.T / TEMPERATURE
        # The same partner twice in a batch is no negative of the other row.
        is_same = (partner_ids[own][:, None] == partner_ids[None]).all(-1)
        is_same[own, own] = False
        return logits.masked_fill(is_same, float("-inf")), own

    @torch.inference_mode()
    def evaluate(
        self, model: Any, examples: Sequence[Example], advance: Callable[[int], None]
    ) -> Evaluation:
        """Rank the distinct held-out partners for each text: mean reciprocal rank, recall at 1 and 5."""
        model.eval()
        partners = list(dict.fromkeys(example.target for example in examples))
        texts = self._vectors(model, [self.source_ids(e) for e in examples], advance)
        others = self._vectors(model, [self.text_ids(p) for p in partners], lambda _count: None)
        similar = texts @ others.T
        own = torch.tensor([partners.index(example.target) for example in examples])
        own_similar = similar.gather(1, own.to(similar.device)[:, None])
        # Ties count against the partner, so that a model that maps all to one vector finds nothing.
        ranks = (similar >= own_similar).sum(dim=1).float()
        best = tuple(partners[i] for i in similar.argmax(dim=1).tolist())
        sums = {
            "mrr": mean_sums((1 / ranks).tolist()),
            "recall_at_1": mean_sums((ranks <= 1).tolist()),
            "recall_at_5": mean_sums((ranks <= 5).tolist()),
        }
        return Evaluation.of(sums, best, best)

    def _vectors(
        self, model: Any, ids: Sequence[Sequence[int]], advance: Callable[[int], None]
    ) -> Tensor:
        """Return one vector a row, [rows, hidden], in the order given."""
        vectors: list[Tensor | None] = [None] * len(ids)
        for part, batch in self.batches(ids, model, advance):
            found = mean_vectors(model, batch["input_ids"], batch["attention_mask"])
            for i, vector in zip(part, found, strict=True):
                vectors[i] = vector
        return torch.stack([vector for vector in vectors if vector is not None])


def mean_vectors(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean last hidden state of each row's tokens, of length 1; float32 [B, hidden]."""
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
    mask = attention_mask.unsqueeze(-1).float()
    return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
