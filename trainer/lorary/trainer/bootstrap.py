"""How sure a held-out figure is: the paired bootstrap over the held-out examples.

Every figure here is a function of *sums over examples*: accuracy of the number of right answers, BLEU of
n-gram counts, perplexity of nats and tokens. So a resample (N examples drawn with replacement) is
nothing but another weighted sum of one matrix, and corpus figures such as BLEU and macro-F1 are resampled as
what they are, and not as means of sentence scores.

Base and adapter are always measured on the same resamples. What makes an example hard is then in both,
and the interval of their difference is narrower than the two intervals suggest. Percentile intervals:
Efron and Tibshirani, *An Introduction to the Bootstrap* (1993), chapter 13; in pairs for corpus figures: Koehn,
*Statistical Significance Tests for Machine Translation Evaluation* (EMNLP 2004), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorary.registry.manifest import Interval, Uncertainty

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_CHUNK = 64  # resamples held in memory at a time
_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """A figure over N examples, as a function of sums over them.

    Attributes:
        parts: float64 [N, K]: what each example adds to each of K sums.
        figure: from sums [R, K], one row a resample, to the figures [R].
    """

    parts: Floats
    figure: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """The figure over all examples, each once."""
        return float(self.figure(self.parts.sum(axis=0, keepdims=True))[0])

    @property
    def by_example(self) -> Floats:
        """The figure of each example alone, [N]."""
        return self.figure(self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How figures are resampled.

    Attributes:
        num_resamples: how often; 0 gives no intervals.
        confidence: the share of the resamples that an interval holds, in (0, 1).
        seed: of the draws; the same seed and N draw the same examples.
    """

    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def uncertainty(
        self, adapter: Mapping[str, Sums], base: Mapping[str, Sums] | None
    ) -> dict[str, Uncertainty]:
        """Return the intervals of every figure, all drawn with the same resamples.

        Args:
            adapter: figures by name, all over the same N examples.
            base: those of the base over the same examples; ``None`` where it was not measured.

        Raises:
            ValueError: figures over different numbers of examples.
        """
        base = {} if base is None else base
        if not adapter or not self.num_resamples:
            return {}
        drawn = self._draw({"adapter": adapter, "base": base})
        found = {}
        for name in adapter:
            with_adapter, without = drawn["adapter"][name], drawn["base"].get(name)
            found[name] = Uncertainty(
                adapter=self._interval(with_adapter),
                base=None if without is None else self._interval(without),
                difference=None if without is None else self._interval(with_adapter - without),
            )
        return found

    def _draw(
        self, sides: Mapping[str, Mapping[str, Sums]]
    ) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Return every figure of every resample, [R], by side and name."""
        sizes = {len(one.parts) for figures in sides.values() for one in figures.values()}
        if len(sizes) != 1:
            raise ValueError(f"figures over different numbers of examples: {sorted(sizes)}")
        (size,) = sizes
        rng = np.random.default_rng(self.seed)
        found: dict[str, dict[str, list[Floats]]] = {
            side: {name: [] for name in figures} for side, figures in sides.items()
        }
        for start in range(0, self.num_resamples, _CHUNK):
            rows = min(_CHUNK, self.num_resamples - start)
            picks = rng.integers(0, size, (rows, size))
            weights = np.stack([np.bincount(one, minlength=size) for one in picks]).astype(float)
            for side, figures in sides.items():
                for name, one in figures.items():
                    found[side][name].append(one.figure(weights @ one.parts))
        return {
            side: {name: np.concatenate(chunks) for name, chunks in figures.items()}
            for side, figures in found.items()
        }

    def _interval(self, drawn: Floats) -> Interval:
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return Interval(low=round(float(low), _DIGITS), high=round(float(high), _DIGITS))
