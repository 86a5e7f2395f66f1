"""What would be trained on, before anything is: how long the rows are, and which of their tokens are learned.

``lorary train RECIPE --preview`` loads a tokenizer and no model. Whoever masks the wrong half of an example, cuts
what mattered or pads to ten times the length sees it here and not after a night of training.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lorary.bases import PromptBuilder, find_base
from lorary.bases.load import load_tokenizer
from lorary.errors import InvalidRecipe
from lorary.registry.manifest import SERVED_KINDS
from lorary.trainer.data import load_splits
from lorary.trainer.encoding import Encoder
from lorary.trainer.packing import plan_packs
from lorary.trainer.progress import Reporter
from lorary.trainer.served_template import with_served_template
from lorary.trainer.sources import resolve_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from lorary.trainer.encoding import Row
    from lorary.trainer.recipe import Recipe

NUM_EXAMPLES = 3
_PERCENTILES = (50, 90, 95, 99)
_BAR = 40
_SHOWN_TOKENS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """Facts of the training rows, those too long included.

    Attributes:
        lengths: tokens of every row, int64 [N].
        num_learned: learned tokens of all rows.
        max_length: ``training.max_length``.
        num_packed: rows after packing; 0 without it.
        examples: the first ones: where each was read, its row, and the text of every token.
        facts: what else there is to say, by name.
    """

    lengths: NDArray[np.int64]
    num_learned: int
    max_length: int
    num_packed: int
    examples: tuple[tuple[str, Row, tuple[str, ...]], ...]
    facts: dict[str, Any]

    @property
    def num_too_long(self) -> int:
        """Rows that are left out."""
        return int((self.lengths > self.max_length).sum())

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (first length, last length, rows) of at most twelve bins of a round width."""
        longest = int(self.lengths.max())
        width = _round_width(longest, 12)
        bounds = np.arange(0, longest + width + 1, width)
        counts, _ = np.histogram(self.lengths, bounds + 0.5)
        found = [(int(a) + 1, int(b)) for a, b in pairwise(bounds)]
        return [
            (*bin_, int(count))
            for bin_, count in zip(found, counts, strict=True)
            if bin_[0] <= longest
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            **self.facts,
            "lengths": _statistics(self.lengths),
            "histogram": [{"from": a, "to": b, "rows": n} for a, b, n in self.histogram()],
            "max_length": self.max_length,
            "too_long": {
                "rows": self.num_too_long,
                "share": round(self.num_too_long / len(self.lengths), 4),
            },
            "tokens": int(self.lengths.sum()),
            "learned_tokens": self.num_learned,
            "packed_rows": self.num_packed,
            "examples": [
                {
                    "place": place,
                    "tokens": [
                        {"id": token, "text": text, "learned": is_learned}
                        for token, text, is_learned in zip(
                            row.input_ids, texts, row.is_learned(), strict=True
                        )
                    ],
                }
                for place, row, texts in self.examples
            ],
        }

    def renderables(self) -> list[RenderableType]:
        """Return what a person sees: a table, a histogram, and the first examples in colour."""
        from rich.text import Text

        legend = Text.assemble("\ntokens: ", ("read", "dim"), ", ", ("learned", _LEARNED))
        shown: list[RenderableType] = [self._table(), self._bars(), legend]
        for place, row, texts in self.examples:
            shown += [Text(f"\n{place}, {len(row.input_ids)} tokens", style="bold")]
            shown += [_coloured(row, texts)]
        return shown

    def _table(self) -> Table:
        from lorary.registry.cli_support import table

        rows = table("what", "value", title="nothing was trained or written")
        tokens = int(self.lengths.sum())
        facts = {
            **self.facts,
            "tokens": tokens,
            "learned": f"{self.num_learned} ({self.num_learned / tokens:.1%})",
            "length": ", ".join(f"{k} {v:g}" for k, v in _statistics(self.lengths).items()),
            "too long, left out": f"{self.num_too_long} of {len(self.lengths)} "
            f"({self.num_too_long / len(self.lengths):.1%}), training.max_length {self.max_length}",
        }
        if self.num_packed:
            kept = int(self.lengths[self.lengths <= self.max_length].sum())
            full = kept / (self.num_packed * self.max_length)
            facts["packed rows"] = f"{self.num_packed}, {full:.1%} full"
        for name, value in facts.items():
            rows.add_row(name, str(value))
        return rows

    def _bars(self) -> Table:
        from lorary.registry.cli_support import table

        bars = table("tokens", "rows", "", title="\nlengths")
        bins = self.histogram()
        most = max(count for _, _, count in bins)
        for first, last, count in bins:
            style = "red" if first > self.max_length else ""
            bar = "█" * -(-_BAR * count // most)
            bars.add_row(f"{first}-{last}", str(count), bar, style=style)
        return bars


def preview(
    recipe: Recipe, reporter: Reporter | None = None, num_examples: int = NUM_EXAMPLES
) -> Preview:
    """Read, split and encode a recipe's data, and say what its training examples are.

    Rows that are all too long are shown, not refused: to see that is what this is for.

    Raises:
        InvalidRecipe: the data does not fit the recipe, or its task is not a causal language model's.
        BaseNotFound, MissingDependency: the base or the data is not here.
    """
    if recipe.task.kind not in SERVED_KINDS:
        raise InvalidRecipe(
            f"--preview shows which tokens a causal language model learns, and the task is a "
            f"{recipe.task.kind}; --dry-run says how long its rows are."
        )
    recipe = resolve_shape(recipe)
    base = find_base(recipe.base, progress=(reporter or Reporter(quiet=True)).note)
    tokenizer = load_tokenizer(base)
    builder = PromptBuilder(tokenizer)
    splits = load_splits(recipe)
    recipe = with_served_template(recipe, builder, splits.test)
    longest = recipe.training.max_length
    encoder = Encoder(builder, recipe.task.to_manifest())
    lengths, num_learned = array("q"), 0
    examples: list[tuple[str, Row, tuple[str, ...]]] = []
    for example in splits.train:
        rows = encoder.rows(example, longest)
        lengths.extend(len(row.input_ids) for row in rows)
        num_learned += sum(sum(row.is_learned()) for row in rows)
        if len(examples) < num_examples:
            texts = tuple(tokenizer.decode([token]) for token in rows[0].input_ids)
            examples.append((example.place, rows[0], texts))
    found = np.asarray(lengths, dtype=np.int64)
    fitting = found[found <= longest].tolist()
    packs = plan_packs(fitting, max_length=longest, seed=0) if recipe.training.packing else []
    return Preview(
        lengths=found,
        num_learned=num_learned,
        max_length=longest,
        num_packed=len(packs),
        examples=tuple(examples),
        facts={
            "base": base.name,
            "shape": recipe.data.shape,
            "served template": recipe.task.template,
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
            "duplicates dropped": splits.num_duplicates,
        },
    )


_LEARNED = "bold green"


def _coloured(row: Row, texts: tuple[str, ...]) -> Text:
    """Return a row's text, what is learned in another colour, every other token underlined."""
    from rich.text import Text

    shown = Text()
    tokens = zip(texts, row.is_learned(), strict=True)
    for i, (text, is_learned) in enumerate(islice(tokens, _SHOWN_TOKENS)):
        style = _LEARNED if is_learned else "dim"
        shown.append(text, style=f"{style} underline" if i % 2 else style)
    if len(texts) > _SHOWN_TOKENS:
        shown.append(f" … {len(texts) - _SHOWN_TOKENS} more tokens", style="italic")
    return shown


def _statistics(lengths: NDArray[np.int64]) -> dict[str, float]:
    percentiles = np.percentile(lengths, _PERCENTILES, method="higher")
    return {
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 1),
        **{f"p{p}": int(v) for p, v in zip(_PERCENTILES, percentiles, strict=True)},
        "max": int(lengths.max()),
    }


def _round_width(longest: int, num_bins: int) -> int:
    """Return the least of 1, 2, 5, 10, 20, 50, … of which ``num_bins`` cover ``longest``."""
    width = 1
    while width * num_bins < longest:
        width = width * 5 // 2 if str(width)[0] == "2" else width * 2
    return width
