"""One label for a whole text, by a head over an encoder or a decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lorary.trainer.evaluate import Evaluation
from lorary.trainer.kinds.text_kind import LabelRow, TextKind
from lorary.trainer.metrics import calibration_sums, f1_sums, mean_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lorary.trainer.examples import Example


class SequenceClassification(TextKind):
    """``sequence_classification``: a linear head over the first token (encoders) or the last (decoders)."""

    peft_task: ClassVar[str] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    def options(self) -> Mapping[str, Any]:
        """Name the labels in the model's configuration."""
        return label_options(self.task.labels)

    def row(self, example: Example) -> LabelRow:
        """Tokenize a text; its label is an index into ``task.labels``."""
        label = self.task.labels.index(example.target)
        return LabelRow(input_ids=self.source_ids(example), labels=(label,))

    def collate(self, rows: Sequence[LabelRow]) -> dict[str, Tensor]:
        """Pad; ``labels`` is int64 [B]."""
        labels = torch.tensor([row.labels[0] for row in rows])
        return {**self.padded([row.input_ids for row in rows]), "labels": labels}

    def scores(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits [B, labels]."""
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**texts).logits, batch["labels"]

    @torch.inference_mode()
    def evaluate(
        self, model: Any, examples: Sequence[Example], advance: Callable[[int], None]
    ) -> Evaluation:
        """Take the likeliest label of each text; accuracy, macro-F1, expected calibration error."""
        model.eval()
        ids = [self.source_ids(example) for example in examples]
        probabilities: list[tuple[float, ...]] = [()] * len(ids)
        for part, batch in self.batches(ids, model, advance):
            shares = model(**batch).logits.float().softmax(-1).tolist()
            for i, row in zip(part, shares, strict=True):
                probabilities[i] = tuple(row)
        sure = [max(row) for row in probabilities]
        chosen = [
            self.task.labels[row.index(top)] for row, top in zip(probabilities, sure, strict=True)
        ]
        wanted = [example.target for example in examples]
        is_right = [c == w for c, w in zip(chosen, wanted, strict=True)]
        sums = {
            "accuracy": mean_sums(is_right),
            "f1": f1_sums(chosen, wanted),
            "ece": calibration_sums(sure, is_right),
        }
        return Evaluation.of(sums, chosen, chosen, probabilities)


def label_options(labels: Sequence[str]) -> Mapping[str, Any]:
    """Return the configuration of a head over ``labels``, in their order."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
