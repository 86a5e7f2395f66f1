"""Text to text by an encoder-decoder: the encoder reads the rendered template, the decoder answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lorary.trainer.batches import IGNORED
from lorary.trainer.evaluate import Evaluation
from lorary.trainer.head import head_reads
from lorary.trainer.kinds.text_kind import LabelRow, TextKind, pad_right
from lorary.trainer.metrics import text_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorary.trainer.examples import Example


class Seq2Seq(TextKind):
    """``seq2seq``: measured on texts that the model generates, never on teacher-forced ones."""

    peft_task: ClassVar[str] = "SEQ_2_SEQ_LM"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    needs_end: ClassVar[bool] = True

    def row(self, example: Example) -> LabelRow:
        """Tokenize source and target; the target ends with the end token, which is learned."""
        end = int(self.tokenizer.eos_token_id)
        target = list(self.tokenizer(text_target=example.target, verbose=False)["input_ids"])
        if not target or target[-1] != end:
            target.append(end)
        return LabelRow(input_ids=self.source_ids(example), labels=tuple(target))

    def collate(self, rows: Sequence[LabelRow]) -> dict[str, Tensor]:
        """Pad; ``labels`` is int64 [B, U], the target's ids."""
        labels = pad_right([row.labels for row in rows], IGNORED)
        return {**self.padded([row.input_ids for row in rows]), "labels": labels}

    def scores(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits of the target's tokens [N, vocab]; padding never reaches the head."""
        labels = batch["labels"]
        rows, positions = (labels != IGNORED).nonzero(as_tuple=True)
        shifted = model.get_base_model().prepare_decoder_input_ids_from_labels(labels=labels)
        with head_reads(model, lambda hidden: hidden[rows, positions].unsqueeze(0)):
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                decoder_input_ids=shifted,
                use_cache=False,
            ).logits
        return logits.squeeze(0), labels[rows, positions]

    @torch.inference_mode()
    def evaluate(
        self, model: Any, examples: Sequence[Example], advance: Callable[[int], None]
    ) -> Evaluation:
        """Answer greedily, whatever the base's own generation settings say, and score the texts."""
        from transformers import GenerationConfig

        model.eval()
        config = model.config
        settings = GenerationConfig(
            max_new_tokens=self.task.max_new_tokens,
            do_sample=False,
            num_beams=1,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        ids = [self.source_ids(example) for example in examples]
        texts = [""] * len(ids)
        used_cache, config.use_cache = config.use_cache, True
        try:
            for part, batch in self.batches(ids, model, advance):
                answers = model.generate(**batch, generation_config=settings)
                for i, text in zip(
                    part,
                    self.tokenizer.batch_decode(answers, skip_special_tokens=True),
                    strict=True,
                ):
                    texts[i] = self._cut(text)
        finally:
            config.use_cache = used_cache
        wanted = [example.target for example in examples]
        return Evaluation.of(text_sums(self.recipe.metric, texts, wanted), texts, texts)

    def _cut(self, text: str) -> str:
        """End a text before the first stop string."""
        ends = [text.find(stop) for stop in self.task.stop if stop in text]
        return text[: min(ends, default=len(text))].strip()
