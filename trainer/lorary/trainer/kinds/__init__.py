"""Task kinds: what is learned from a row, under which head, and how it is measured; one module each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorary.errors import InvalidRecipe
from lorary.registry.manifest import SERVED_KINDS
from lorary.trainer.kinds.kind import Kind

if TYPE_CHECKING:
    from lorary.registry.manifest import TaskKind
    from lorary.trainer.recipe import Recipe

__all__ = ["Kind", "kind_of"]


def kind_of(recipe: Recipe) -> type[Kind]:
    """Return the class of the recipe's kind.

    Raises:
        InvalidRecipe: the recipe asks for what only a causal language model can do.
    """
    name = recipe.task.kind
    if name not in SERVED_KINDS:
        if recipe.method.base_quantization != "none":
            raise InvalidRecipe(
                f"method.quantization is {recipe.method.base_quantization} for a {name}, whose base is "
                "trained whole; use method.name lora."
            )
        if recipe.training.packing:
            raise InvalidRecipe(f"training.packing is set for a {name}, whose rows are not packed.")
    return _class_of(name)


def _class_of(name: TaskKind) -> type[Kind]:
    """Import and return a kind's class."""
    match name:
        case "sequence_classification":
            from lorary.trainer.kinds.sequence_classification import SequenceClassification

            return SequenceClassification
        case "token_classification":
            from lorary.trainer.kinds.token_classification import TokenClassification

            return TokenClassification
        case "seq2seq":
            from lorary.trainer.kinds.seq2seq import Seq2Seq

            return Seq2Seq
        case "embeddings":
            from lorary.trainer.kinds.embeddings import Embeddings

            return Embeddings
        case "generation" | "classification":
            from lorary.trainer.kinds.causal import Causal

            return Causal
