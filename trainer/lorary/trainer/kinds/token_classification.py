"""One label for each word of a text. Words are what white space separates; so are the target's labels."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lorary.errors import InvalidRecipe
from lorary.trainer.batches import IGNORED
from lorary.trainer.bootstrap import Sums
from lorary.trainer.evaluate import Evaluation
from lorary.trainer.kinds.sequence_classification import label_options
from lorary.trainer.kinds.spans import are_span_tags, span_sums
from lorary.trainer.kinds.text_kind import LabelRow, TextKind, pad_right
from lorary.trainer.metrics import f1_sums, mean_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from lorary.trainer.examples import Example


class TokenClassification(TextKind):
    """``token_classification``: the label of a word is learned and read at its first token."""

    peft_task: ClassVar[str] = "TOKEN_CLS"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    def options(self) -> Mapping[str, Any]:
        """Name the labels in the model's configuration."""
        return label_options(self.task.labels)

    def row(self, example: Example) -> LabelRow:
        """Tokenize a text; tokens that begin no word have the label that is not learned."""
        wanted = example.target.split()
        unknown = [label for label in wanted if label not in self.task.labels]
        if unknown:
            raise InvalidRecipe(
                f"the example '{example.text[:60]}' has the label '{unknown[0]}', which is not in "
                f"task.labels {list(self.task.labels)}."
            )
        ids, firsts = self._words(example)
        if len(firsts) != len(wanted):
            raise InvalidRecipe(
                f"the example '{example.text[:60]}' has {len(firsts)} words and {len(wanted)} labels; "
                "give one label for each word, white space between them."
            )
        labels = [IGNORED] * len(ids)
        for position, label in zip(firsts, wanted, strict=True):
            labels[position] = self.task.labels.index(label)
        return LabelRow(input_ids=ids, labels=tuple(labels))

    def collate(self, rows: Sequence[LabelRow]) -> dict[str, Tensor]:
        """Pad; ``labels`` is int64 [B, T]."""
        labels = pad_right([row.labels for row in rows], IGNORED)
        return {**self.padded([row.input_ids for row in rows]), "labels": labels}

    def scores(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits of the words' first tokens [words, labels]."""
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        is_first = batch["labels"] != IGNORED
        return model(**texts).logits[is_first], batch["labels"][is_first]

    @torch.inference_mode()
    def evaluate(
        self, model: Any, examples: Sequence[Example], advance: Callable[[int], None]
    ) -> Evaluation:
        """Take the likeliest label of each word; accuracy over words, F1 over spans or labels."""
        model.eval()
        tokenized = [self._words(example) for example in examples]
        chosen: list[list[str]] = [[] for _ in examples]
        for part, batch in self.batches([ids for ids, _ in tokenized], model, advance):
            best = model(**batch).logits.argmax(-1).tolist()
            for i, labels in zip(part, best, strict=True):
                chosen[i] = [self.task.labels[labels[position]] for position in tokenized[i][1]]
        wanted = [example.target.split() for example in examples]
        predictions = [" ".join(labels) for labels in chosen]
        return Evaluation.of(word_sums(chosen, wanted, self.task.labels), predictions, predictions)

    def _words(self, example: Example) -> tuple[tuple[int, ...], list[int]]:
        """Return the token ids of a text, and the position of each word's first token."""
        if not self.tokenizer.is_fast:
            raise InvalidRecipe(
                f"the tokenizer of base '{self.base.name}' gives no character offsets, by which words "
                "are found; token_classification needs a base with a tokenizer.json."
            )
        text = self.builder.render(self.task, example.inputs)
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        # A token belongs to the word of its last character: some tokens begin with a space.
        first = {
            end - 1: position
            for position, (start, end) in reversed([*enumerate(encoded["offset_mapping"])])
            if end > start
        }
        firsts = []
        for word in re.finditer(r"\S+", text):
            inside = [first[i] for i in range(*word.span()) if i in first]
            if not inside:
                raise InvalidRecipe(
                    f"the word {word.group()!r} of the example '{example.text[:60]}' has no token in "
                    f"base '{self.base.name}'. Take it out of the text."
                )
            firsts.append(min(inside))
        return tuple(encoded["input_ids"]), firsts


def word_sums(
    chosen: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, Sums]:
    """Return F1 (of spans where ``labels`` mark some, else the mean over labels) and accuracy of words."""
    words = list(chain(*chosen)), list(chain(*wanted))
    starts = np.cumsum([0, *map(len, wanted[:-1])])

    def by_example(of_words: Sums) -> Sums:
        return Sums(parts=np.add.reduceat(of_words.parts, starts), figure=of_words.figure)

    is_right = [c == w for c, w in zip(*words, strict=True)]
    f1 = span_sums(chosen, wanted) if are_span_tags(labels) else by_example(f1_sums(*words))
    return {"f1": f1, "accuracy": by_example(mean_sums(is_right))}
