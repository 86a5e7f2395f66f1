"""Answers of a causal language model: free text, or the likeliest of some labels. What servers serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lorary.bases.load import load_model
from lorary.trainer.batches import collate
from lorary.trainer.data import encode_rows
from lorary.trainer.encoding import Encoder
from lorary.trainer.kinds.kind import Kind, TokenRow
from lorary.trainer.packing import PackedRows
from lorary.trainer.processes import local_device

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch
    from torch import Tensor

    from lorary.trainer.encoding import Row
    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.examples import Example


class Causal(Kind):
    """``generation`` and ``classification``."""

    peft_task: ClassVar[str] = "CAUSAL_LM"
    needs_end: ClassVar[bool] = True
    has_probes: ClassVar[bool] = True

    def encode(
        self, examples: Collection[Example], *, is_held_out: bool = False
    ) -> tuple[Sequence[TokenRow], int]:
        """Tokenize prompts and answers as the server will; pack rows to train on if the recipe says so."""
        training = self.recipe.training
        rows, too_long = encode_rows(examples, self.task, self.builder, training.max_length)
        if training.packing and not is_held_out:
            rows = PackedRows(rows, max_length=training.max_length, seed=training.seed)
        return rows, too_long

    def check(self, examples: Sequence[Example]) -> None:
        """Build every label's and every prompt's ids."""
        for label in self.task.labels:
            self.builder.label_ids(label)
        encoder = Encoder(self.builder, self.task)
        for example in examples:
            encoder.prompt(example)
            encoder.rows(example, self.recipe.training.max_length)

    def load(self, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        """Load the base, quantized where the recipe says so; no module is trained whole."""
        from lorary.trainer import grouped_attention

        device = self.recipe.training.device
        model = load_model(
            self.base,
            quantization=self.formats,
            dtype=dtype,
            device=local_device(device),
            attn_implementation="sdpa" if device.startswith("cuda") else "eager",
        )
        if grouped_attention.attention_of(model.config, device) == grouped_attention.NAME:
            model.set_attn_implementation(grouped_attention.NAME)
        return model, ()

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pad on the right; labels [B, T] are not shifted."""
        return collate(rows, int(self.tokenizer.pad_token_id))

    def scores(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits that predict a learned token."""
        from lorary.trainer.loop import selected_logits

        return selected_logits(
            model, batch["input_ids"], batch["labels"], batch.get("position_ids")
        )

    def evaluate(
        self, model: Any, examples: Sequence[Example], advance: Callable[[int], None]
    ) -> Evaluation:
        """Answer greedily, and score labels where there are some."""
        from lorary.trainer.evaluate import Evaluator

        evaluator = Evaluator(model, self.tokenizer, self.builder, self.recipe)
        return evaluator.evaluate(examples, advance)
