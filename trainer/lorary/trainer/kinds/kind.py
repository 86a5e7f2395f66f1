"""What a task kind decides, in one interface; everything else of a run is the same for all kinds.

Every kind's loss is a cross entropy: of the next token, of a label, or of the partner among the batch.
So a kind only says which logits stand against which targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lorary.trainer.quantplan.use import formats_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch
    from torch import Tensor

    from lorary.bases import Base, PromptBuilder
    from lorary.trainer.evaluate import Evaluation
    from lorary.trainer.examples import Example
    from lorary.trainer.recipe import Recipe


class TokenRow(Protocol):
    """One row to train on; batches are planned by its length."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What the model reads."""


class Kind(ABC):
    """One task kind over one base.

    Attributes:
        peft_task: name of the ``peft.TaskType`` that the adapter is saved with.
        needs_end: whether the base's tokenizer must have an end-of-text token.
        has_probes: whether golden probes are recorded for servers.
        formats: how the base is loaded: one quantization, or by a plan one for each linear layer.
    """

    peft_task: ClassVar[str]
    needs_end: ClassVar[bool] = False
    has_probes: ClassVar[bool] = False

    def __init__(self, recipe: Recipe, base: Base, tokenizer: Any, builder: PromptBuilder) -> None:
        self.recipe = recipe
        self.base = base
        self.tokenizer = tokenizer
        self.builder = builder
        self.task = recipe.task.to_manifest()
        self.formats = formats_of(recipe.method, base)

    @abstractmethod
    def encode(
        self, examples: Collection[Example], *, is_held_out: bool = False
    ) -> tuple[Sequence[TokenRow], int]:
        """Tokenize examples to train or validate on; return rows, and how many were too long.

        Raises:
            InvalidRecipe: an example cannot be tokenized, or all are too long.
        """

    @abstractmethod
    def check(self, examples: Sequence[Example]) -> None:
        """Make sure that ``evaluate`` can ask every one of these held-out examples.

        Raises:
            InvalidRecipe: it cannot; the message names the example.
        """

    @abstractmethod
    def load(self, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        """Load the base as this kind needs it; return it and the modules to train whole, by full name."""

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Pad rows to one batch; ``labels`` (int64, −100 where nothing is learned) is among its keys."""

    @abstractmethod
    def scores(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run the model; return logits [N, C] and targets [N], int64, one for each learned label."""

    @abstractmethod
    def evaluate(
        self, model: Any, examples: Sequence[Example], advance: Callable[[int], None]
    ) -> Evaluation:
        """Measure the model, adapter on or off as it is, on held-out examples.

        Args:
            model: wrapped by PEFT.
            examples: held out.
            advance: told after each batch how many more examples are done.
        """
