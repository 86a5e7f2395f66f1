"""What the kinds beside causal language models share: text in, a padded batch, a model under a head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorary.bases.tasks import load_task_model
from lorary.errors import InvalidRecipe, InvalidRequest
from lorary.trainer.data import StreamedExamples
from lorary.trainer.kinds.kind import Kind, TokenRow
from lorary.trainer.processes import local_device

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    import torch
    from torch import Tensor

    from lorary.trainer.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRow:
    """Token ids to read, and the labels to learn: one, one a token, or the ids of an answer."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


class TextKind(Kind):
    """A kind whose examples are rendered to text that the base's tokenizer frames by itself.

    Attributes:
        auto_class: the transformers class under which the base is loaded.
    """

    auto_class: ClassVar[str]

    @abstractmethod
    def row(self, example: Example) -> TokenRow:
        """Tokenize one example.

        Raises:
            InvalidRequest, InvalidRecipe: it does not fit the template, the tokenizer or the labels.
        """

    def options(self) -> Mapping[str, Any]:
        """Return what ``from_pretrained`` is told beside dtype and device."""
        return {}

    def encode(
        self, examples: Collection[Example], *, is_held_out: bool = False
    ) -> tuple[Sequence[TokenRow], int]:
        """Tokenize; rows longer than the base or the recipe allow are left out."""
        del is_held_out
        placed = (
            examples.placed() if isinstance(examples, StreamedExamples) else enumerate(examples)
        )
        found = sorted(((i, self._row(e)) for i, e in placed), key=lambda pair: pair[0])
        rows = [row for _, row in found if longest(row) <= self.max_length]
        if examples and not rows:
            raise InvalidRecipe(
                f"all {len(examples)} examples are longer than {self.max_length} tokens. Raise "
                "training.max_length, or cut texts with data.max_words."
            )
        return rows, len(examples) - len(rows)

    def check(self, examples: Sequence[Example]) -> None:
        """Tokenize; a held-out example that is too long is refused, so that nothing is cut unseen."""
        for example in examples:
            length = longest(self._row(example))
            if length > self.max_length:
                raise InvalidRecipe(
                    f"the held-out example '{example.text[:60]}' has {length} tokens; the limit is "
                    f"{self.max_length}. Raise training.max_length, or cut texts with data.max_words."
                )

    def load(self, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        """Load the base under its head; modules that the base does not hold are trained whole."""
        from lorary.trainer.quiet import quiet_libraries

        with quiet_libraries():
            model, heads = load_task_model(
                self.base,
                self.auto_class,
                dtype=dtype,
                device=local_device(self.recipe.training.device),
                **self.options(),
            )
        if model.config.pad_token_id is None:  # a decoder's classifier finds the last word by it
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model, heads

    @property
    def max_length(self) -> int:
        """The recipe's, or the tokenizer's if it is shorter."""
        return min(self.recipe.training.max_length, int(self.tokenizer.model_max_length))

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Tokenize with the special tokens that the base expects around a text."""
        return tuple(self.tokenizer(text, verbose=False)["input_ids"])

    def source_ids(self, example: Example) -> tuple[int, ...]:
        """Render the template and tokenize it."""
        return self.text_ids(self.builder.render(self.task, example.inputs))

    def padded(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, int64 [B, T], padded on the right."""
        pad = int(self.tokenizer.pad_token_id)
        return {
            "input_ids": pad_right(ids, pad),
            "attention_mask": pad_right([[1] * len(row) for row in ids], 0),
        }

    def batches(
        self, ids: Sequence[Sequence[int]], model: Any, advance: Callable[[int], None]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield indices and their padded batch on the model's device, longest rows first."""
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        size = self.recipe.evaluation.batch_size
        for start in range(0, len(order), size):
            part = order[start : start + size]
            batch = self.padded([ids[i] for i in part])
            yield part, {name: value.to(model.device) for name, value in batch.items()}
            advance(len(part))

    def _row(self, example: Example) -> TokenRow:
        try:
            return self.row(example)
        except InvalidRequest as error:
            raise InvalidRecipe(
                f"the example '{example.text[:60]}' cannot be tokenized: {error}"
            ) from error


def longest(row: TokenRow) -> int:
    """Return the number of tokens that the model must be able to hold for a row."""
    return max(len(row.input_ids), len(getattr(row, "labels", ())))


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return int64 [B, T] with each row's end filled with ``value``."""
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
