"""How far two runs are apart: loss curve, figures, tensors.

A number ``b`` reproduces ``a`` within a tolerance t when ``|a - b| <= t * max(|a|, 1)``: relative for what
is large, absolute for losses and shares below 1, where a relative bound would ask for noise to repeat.
Tensors reproduce when ``‖ΔW₂ - ΔW₁‖ <= t ‖ΔW₁‖`` over all modules together (Frobenius), ΔW = scale · B A:
A and B alone mean nothing, their product is what acts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.registry.weight_diff import compare_weights, total_change

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorary.registry.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One thing that was compared.

    Attributes:
        what: ``loss``, ``validation loss``, ``accuracy of adapter``, ``tensors`` …
        difference: the largest, in units of the tolerance's rule; None where nothing can be subtracted.
        is_equal: every bit.
        is_within: the tolerance is kept.
        detail: where the largest difference is, or the two values.
    """

    what: str
    difference: float | None
    is_equal: bool
    is_within: bool
    detail: str


def compare_curves(
    before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float
) -> list[Comparison]:
    """Compare two ``loss_curve`` entries of manifests; steps must be the same."""
    found = []
    pairs = (("loss", "steps", "loss"), ("validation loss", "validation_steps", "validation_loss"))
    for what, steps, values in pairs:
        old, new = list(before.get(values, ())), list(after.get(values, ()))
        if not old and not new:
            continue
        if before.get(steps) != after.get(steps):
            detail = f"{len(old)} values then, {len(new)} now, not at the same steps"
            found.append(_comparison(what, None, False, tolerance, detail))
            continue
        differences = [_difference(a, b) for a, b in zip(old, new, strict=True)]
        worst = max(range(len(old)), key=lambda i: _size(differences[i]))
        detail = (
            f"{len(old)} values; at step {before[steps][worst]}: {old[worst]:.6g}, {new[worst]:.6g}"
        )
        found.append(_comparison(what, differences[worst], old == new, tolerance, detail))
    return found


def compare_metrics(before: Manifest, after: Manifest, tolerance: float) -> list[Comparison]:
    """Compare every held-out figure of base and adapter that the older manifest has."""
    if before.metrics is None or after.metrics is None:
        return []
    found = []
    for side in ("adapter", "base"):
        old, new = getattr(before.metrics, side), getattr(after.metrics, side)
        for name, value in old.items():
            now = new.get(name, math.nan)
            detail = f"{value:.6g}, {now:.6g}"
            difference = _difference(value, now)
            found.append(
                _comparison(f"{name} of {side}", difference, value == now, tolerance, detail)
            )
    return found


def compare_tensors(before: Path, after: Path, tolerance: float) -> Comparison:
    """Compare two tensor files in canonical form."""
    changes = compare_weights(before, after)
    is_equal = all(change.kind == "same" for change in changes)
    total = 0.0 if is_equal else total_change(changes)
    largest = changes[0]
    detail = f"{len(changes)} modules"
    if not is_equal:
        detail += f"; most: {largest.module} ({largest.kind})"
    return _comparison("tensors", total, is_equal, tolerance, detail)


def _comparison(
    what: str, difference: float | None, is_equal: bool, tolerance: float, detail: str
) -> Comparison:
    return Comparison(
        what=what,
        difference=difference,
        is_equal=is_equal,
        is_within=is_equal or (difference is not None and difference <= tolerance),
        detail=detail,
    )


def _size(difference: float | None) -> float:
    return math.inf if difference is None else difference


def _difference(a: float, b: float) -> float | None:
    """Return ``|a - b| / max(|a|, 1)``; None where one is no number."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return None
    return abs(a - b) / max(abs(a), 1.0)
