"""How far two adapters' weights are apart, per module, without ever forming B·A.

With thin factorizations ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the small matrix ``R_B R_A^T`` has the singular
values of ``B A`` [rank x rank]. The difference ``B2 A2 - B1 A1`` is itself such a product, of ``[B2, B1]`` and
``[A2; -A1]``, so its norm comes the same way, exactly, and without the cancellation of subtracting squares
of norms.

=====================  =================================================================
change                 Frobenius norm of the difference over that of the older ``B A``
overlap                of the two column spaces: ``sum(cos²) / min(rank1, rank2)`` over their principal angles
                       (Hu et al. 2021, LoRA, §7.2; Björck and Golub 1973 for the angles): 1 is the same
                       space or one within the other, 0 is orthogonal
effective rank         ``exp(entropy)`` of the singular values as shares of their sum (Roy and Vetterli 2007)
=====================  =================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from lorary.registry.safetensors_file import Array, Header, read_header, read_tensor

_KEY: Final = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """One module's, or another tensor's, change.

    Attributes:
        module: its name in the base; of a tensor that is neither A nor B, the tensor's name.
        kind: ``changed``, ``same`` (every bit), ``added`` or ``removed``.
        norm_before: Frobenius norm of B·A (or of the tensor), 0 if it was not there.
        norm_after: the same, now.
        norm_change: Frobenius norm of the difference; ``None`` between two shapes.
        change: ``norm_change / norm_before``; ``None`` without either, or if that was 0.
        overlap: of the column spaces, 0 to 1; ``None`` where there is nothing to compare.
        effective_rank_before: of B·A; ``None`` if it is 0, or for other tensors.
        effective_rank_after: the same, now.
    """

    module: str
    kind: str
    norm_before: float
    norm_after: float
    norm_change: float | None
    change: float | None
    overlap: float | None
    effective_rank_before: float | None
    effective_rank_after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spectrum:
    """Column space and singular values of one B·A."""

    left: Matrix
    values: Matrix

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.values))

    @property
    def effective_rank(self) -> float | None:
        total = float(self.values.sum())
        if not total:
            return None
        shares = self.values[self.values > 0] / total
        return math.exp(-float((shares * np.log(shares)).sum()))


def compare_weights(before: Path, after: Path) -> tuple[ModuleChange, ...]:
    """Compare two adapters' tensor files, the most changed modules first.

    One module of each is in memory at a time.

    Args:
        before: a ``adapter_model.safetensors`` in canonical form (no scale beside B·A).
        after: another one.

    Raises:
        CorruptArtifact: a file is not what it claims.
        StorageError: a file cannot be read.
    """
    found = list(_changes(before, after))
    return tuple(sorted(found, key=lambda change: (-_weight(change), change.module)))


def total_change(changes: tuple[ModuleChange, ...]) -> float | None:
    """Return the norm of all differences over that of everything before; ``None`` if there is none."""
    before = math.hypot(*(change.norm_before for change in changes))
    norms = [change.norm_change for change in changes if change.norm_change is not None]
    return math.hypot(*norms) / before if before and len(norms) == len(changes) else None


def _changes(before: Path, after: Path) -> Iterator[ModuleChange]:
    files = (_File(before), _File(after))
    for module in sorted(files[0].modules | files[1].modules):
        one, two = (file.pair(module) for file in files)
        yield _module(module, one, two)
    for name in sorted(files[0].others | files[1].others):
        yield _tensor(name, *(file.tensor(name) for file in files))


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._header: Header = read_header(path)
        keys = {name: _KEY.fullmatch(name) for name in self._header.tensors}
        self._names = {(m["module"], m["side"]): name for name, m in keys.items() if m}
        pairs = {module for module, _ in self._names}
        self.modules = {m for m in pairs if (m, "A") in self._names and (m, "B") in self._names}
        self.others = {n for n, m in keys.items() if m is None or m["module"] not in self.modules}

    def pair(self, module: str) -> tuple[Array, Array] | None:
        """Return A [rank, in] and B [out, rank] as they are stored."""
        if module not in self.modules:
            return None
        return self.read(self._names[module, "A"]), self.read(self._names[module, "B"])

    def tensor(self, name: str) -> Array | None:
        return self.read(name) if name in self.others else None

    def read(self, name: str) -> Array:
        return read_tensor(self._path, self._header.tensors[name])


def _module(
    module: str, one: tuple[Array, Array] | None, two: tuple[Array, Array] | None
) -> ModuleChange:
    if one is not None and two is not None and all(map(_is_same, one, two)):
        spectrum = _spectrum(*one)
        return _change(module, "same", spectrum, spectrum, 0.0)
    first = None if one is None else _spectrum(*one)
    second = None if two is None else _spectrum(*two)
    if one is None or two is None:
        there = first or second
        assert there is not None
        return _change(module, "added" if one is None else "removed", first, second, there.norm)
    (a1, b1), (a2, b2) = one, two
    if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        # Of two bases: there is no difference of matrices of two shapes.
        return _change(module, "changed", first, second, None)
    a = np.concatenate([a2.astype(np.float64), -a1.astype(np.float64)])
    b = np.concatenate([b2.astype(np.float64), b1.astype(np.float64)], axis=1)
    return _change(module, "changed", first, second, float(np.linalg.norm(_core(a, b)[1])))


def _change(
    module: str, kind: str, first: _Spectrum | None, second: _Spectrum | None, norm: float | None
) -> ModuleChange:
    before = 0.0 if first is None else first.norm
    return ModuleChange(
        module=module,
        kind=kind,
        norm_before=before,
        norm_after=0.0 if second is None else second.norm,
        norm_change=norm,
        change=norm / before if before and norm is not None else None,
        overlap=None if first is None or second is None else _overlap(first, second),
        effective_rank_before=None if first is None else first.effective_rank,
        effective_rank_after=None if second is None else second.effective_rank,
    )


def _tensor(name: str, one: Array | None, two: Array | None) -> ModuleChange:
    first = np.zeros(0) if one is None else one.astype(np.float64).reshape(-1)
    second = np.zeros(0) if two is None else two.astype(np.float64).reshape(-1)
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    norm: float | None
    if one is None or two is None:
        kind, norm = ("added" if one is None else "removed"), max(norms)
    elif one.shape != two.shape:
        kind, norm = "changed", None
    else:
        kind = "same" if _is_same(one, two) else "changed"
        norm = float(np.linalg.norm(second - first))
    return ModuleChange(
        module=name,
        kind=kind,
        norm_before=norms[0],
        norm_after=norms[1],
        norm_change=norm,
        change=norm / norms[0] if norms[0] and norm is not None else None,
        overlap=None,
        effective_rank_before=None,
        effective_rank_after=None,
    )


def _core(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """Return Q_B and the small matrix whose singular values are those of B·A."""
    q_b, r_b = np.linalg.qr(b)
    r_a: Matrix = np.linalg.qr(a.T, mode="r")  # type: ignore[assignment]
    return q_b, r_b @ r_a.T


def _spectrum(a: Array, b: Array) -> _Spectrum:
    q_b, core = _core(a.astype(np.float64), b.astype(np.float64))
    u, values, _ = np.linalg.svd(core)
    # What is below rounding is no direction of the column space.
    floor = (values[0] if len(values) else 0.0) * max(core.shape) * np.finfo(np.float32).eps
    kept = int((values > floor).sum())
    return _Spectrum(left=q_b @ u[:, :kept], values=values[:kept])


def _overlap(first: _Spectrum, second: _Spectrum) -> float | None:
    ranks: tuple[int, int] = first.left.shape[1], second.left.shape[1]
    if not min(ranks) or first.left.shape[0] != second.left.shape[0]:
        return None
    cosines = np.linalg.svd(first.left.T @ second.left, compute_uv=False)
    return min(1.0, float((cosines**2).sum()) / min(ranks))


def _is_same(one: Array, two: Array) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


def _weight(change: ModuleChange) -> float:
    """Return by what changes are sorted: what came, went or has no norm before comes first."""
    if change.kind == "same":
        return -1.0
    return math.inf if change.change is None else change.change
