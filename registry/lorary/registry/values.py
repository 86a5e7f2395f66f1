"""Check the numbers of a module's matrices: finite, with an effect, and not louder than the base.

An adapter of the wrong scale is well-formed, and drowns its base. What tells it is the size of its
change beside that of the weight it changes; the product B·A is never formed for it, because only the
two small products AAᵀ and BᵀB are needed:

    ‖BA‖² = trace((BᵀB)(AAᵀ)),    ‖BA‖ ≤ ‖B‖‖A‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.base import BaseCard
from lorary.registry.findings import Report
from lorary.registry.safetensors_file import (
    Array,
    TensorInfo,
    is_finite,
    read_tensor,
    read_tensors,
)

Squares = Callable[[Path, Sequence[TensorInfo]], Sequence[float]]
"""Returns the sum of squares of each tensor of a file, NaN or infinite where it cannot be said."""


class ModuleTensors(NamedTuple):
    """Where one module's matrices lie; ``magnitude`` is DoRA's vector."""

    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None = None


def check_values(
    path: Path,
    modules: Mapping[str, ModuleTensors],
    scales: Mapping[str, float],
    card: BaseCard,
    report: Report,
    *,
    allow_zero: bool,
    max_ratio: float,
    squares: Squares | None = None,
) -> None:
    """Read every matrix once and report what is wrong with its values.

    One whose sum of squares is a number, and not 0, is sound: it is looked at no further.

    Args:
        path: the tensors' file.
        modules: module name to its tensors, shapes already checked.
        scales: the factor on B·A of each module.
        card: the base; a module without a norm in it is not compared with anything.
        report: told of every problem.
        allow_zero: accept an adapter that changes nothing.
        max_ratio: largest ‖scale·BA‖/‖W‖ of a module.
        squares: how the matrices are read; numpy's way by default.
    """
    infos = [info for found in modules.values() for info in found if info is not None]
    taken = (squares or numpy_squares)(path, infos)
    if _are_sound(modules, taken, scales, card, max_ratio):
        return
    sums = dict(zip(infos, taken, strict=True))
    has_effect = False
    for module, found in modules.items():
        there = [info for info in found if info is not None]
        wrong = [info for info in there if not _is_finite(path, info, sums)]
        for info in wrong:
            report(_not_finite(info))
        if wrong:
            has_effect = True  # of what kind, nobody can say
            continue
        has_effect = has_effect or all(_has_effect(path, info, sums) for info in there[:2])
        size = abs(scales[module]) * _norm_within(
            path, found, module, sums, scales, card, max_ratio
        )
        _check_ratio(module, size, "its change", card, report, max_ratio)
        if found.magnitude is not None:
            size = _norm(path, found.magnitude, sums)
            _check_ratio(module, size, "its magnitude vector", card, report, max_ratio)
    if modules and not has_effect and not allow_zero:
        report(
            IncompatibleAdapter(
                "adapter has no effect: in every module A or B is all zeros, as before training. "
                "Push a trained adapter, or allow it with --allow-zero."
            )
        )


def _are_sound(
    modules: Mapping[str, ModuleTensors],
    sums: Sequence[float],
    scales: Mapping[str, float],
    card: BaseCard,
    max_ratio: float,
) -> bool:
    """Tell of all modules at once whether ``check_values`` has nothing to say; False where it must look closer.

    ``sums`` are A's and B's squares in the order of the modules.
    """
    found = np.asarray(sums)
    if len(found) != 2 * len(modules) or not np.all(np.isfinite(found) & (found > 0.0)):
        return False
    bounds = np.sqrt(found[0::2]) * np.sqrt(found[1::2])
    factors = np.array([abs(scales[module]) for module in modules])
    weights = np.array([card.norms.get(module, math.inf) for module in modules])
    return bool(np.all(factors * bounds <= max_ratio * weights))


def check_finite(path: Path, infos: Iterable[TensorInfo], report: Report) -> None:
    """Read whole modules' tensors and report those with NaN or infinite values."""
    for info in infos:
        if not is_finite(read_tensor(path, info)):
            report(_not_finite(info))


def numpy_squares(path: Path, infos: Sequence[TensorInfo]) -> list[float]:
    """Return sums of squares in single precision; infinite where a square is beyond it."""
    sums = []
    with np.errstate(over="ignore", invalid="ignore"):
        for array in read_tensors(path, infos):
            flat = array.astype(np.float32, copy=False).reshape(-1)
            sums.append(float(np.dot(flat, flat)))
    return sums


def _is_finite(path: Path, info: TensorInfo, sums: Mapping[TensorInfo, float]) -> bool:
    return math.isfinite(sums[info]) or is_finite(read_tensor(path, info))


def _has_effect(path: Path, info: TensorInfo, sums: Mapping[TensorInfo, float]) -> bool:
    # The square of a very small number is 0.
    return sums[info] > 0 or bool(read_tensor(path, info).any())


def _not_finite(info: TensorInfo) -> CorruptArtifact:
    return CorruptArtifact(
        f"tensor {info.name} holds NaN or infinite values; training diverged, or the file is damaged. "
        "Train again with a smaller learning rate."
    )


def product_norm(b: Array, a: Array) -> float:
    """Return ‖B·A‖ (Frobenius) in double precision, without forming the product.

    Semantics: ``sqrt(sum_ij (BᵀB)_ij (AAᵀ)_ij)``; b is [out, r], a is [r, in].
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))
    return math.sqrt(max(squares, 0.0)) if not math.isnan(squares) else math.inf


def _norm_within(
    path: Path,
    found: ModuleTensors,
    module: str,
    sums: Mapping[TensorInfo, float],
    scales: Mapping[str, float],
    card: BaseCard,
    max_ratio: float,
) -> float:
    """Return ‖BA‖, or the cheaper bound ‖B‖‖A‖ where that is within the limit already."""
    bound = math.sqrt(sums[found.a]) * math.sqrt(sums[found.b])
    if abs(scales[module]) * bound <= max_ratio * card.norms.get(module, math.inf):
        return bound
    a, b = read_tensors(path, [found.a, found.b])
    return product_norm(b, a)


def _norm(path: Path, info: TensorInfo, sums: Mapping[TensorInfo, float]) -> float:
    if math.isfinite(sums[info]):
        return math.sqrt(sums[info])
    return float(np.linalg.norm(read_tensor(path, info).astype(np.float64).reshape(-1)))


def _check_ratio(
    module: str, size: float, what: str, card: BaseCard, report: Report, max_ratio: float
) -> None:
    weight = card.norms.get(module, math.inf)
    if size <= max_ratio * weight:
        return
    ratio = size / weight if weight else math.inf
    report(
        IncompatibleAdapter(
            f"module {module}: {what} is {ratio:.3g} times as large as the base's weight (Frobenius "
            f"norms {size:.3g} and {weight:.3g}); the limit is {max_ratio:g}. Its scale is wrong, or "
            "its training diverged. If it is meant, push it with a larger --max-ratio."
        )
    )
