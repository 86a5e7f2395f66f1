"""How far an adapter moves each module: the size of ΔW beside W, and how many directions it uses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

MOST = 0.9
"""The share of ‖ΔW‖² whose directions are counted as its rank."""
_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<number>\d+)\.(?P<rest>.+)")
_MAX_SPECTRUM_SIDE = 1024  # of a full ΔW; its singular values take seconds beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """One module under the adapter.

    Attributes:
        name: in the base, such as ``model.layers.0.self_attn.q_proj``.
        layer: its number; ``None`` outside numbered layers.
        kind: its name within the layer; with the stack's before it, where there are several.
        delta_norm: Frobenius norm of ΔW.
        weight_norm: of W, dequantized.
        singular_values: of ΔW, falling, those that are not zero; empty where they would take too long.
        published_rank: how many of them the adapter holds, where it is less than what was trained; all
            of them where it is ``None``.
    """

    name: str
    layer: int | None
    kind: str
    delta_norm: float
    weight_norm: float
    singular_values: tuple[float, ...]
    published_rank: int | None = None

    @property
    def ratio(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.delta_norm / self.weight_norm if self.weight_norm else 0.0

    @property
    def effective_rank(self) -> float:
        """The number of directions, were all used alike: exp of the entropy of σ / Σσ.

        Roy and Vetterli, *The effective rank* (EUSIPCO 2007), definition 1; 0 for a ΔW of zero.
        """
        if not self.singular_values:
            return 0.0
        total = sum(self.singular_values)
        shares = [value / total for value in self.singular_values]
        return math.exp(-sum(share * math.log(share) for share in shares))

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖² / σ₁², with the Frobenius norm; 0 for a ΔW of zero.

        Rudelson and Vershynin, *Sampling from large matrices* (J. ACM 54(4), 2007), who call it numerical rank.
        """
        if not self.singular_values:
            return 0.0
        return self.energy / self.singular_values[0] ** 2

    def directions_for(self, share: float) -> int:
        """Return the least k with Σ_{i≤k} σᵢ² ≥ ``share`` · ‖ΔW‖².

        By Eckart and Young no ΔW of a lower rank comes as near. With a share of 0.9 it is what Biderman et
        al. measure of full fine-tuning (arXiv 2405.09673).
        """
        wanted = share * self.energy
        kept = 0.0
        for count, value in enumerate(self.singular_values, 1):
            kept += value**2
            if kept >= wanted:
                return count
        return len(self.singular_values)

    @property
    def energy(self) -> float:
        """‖ΔW‖², of its singular values."""
        return sum(value**2 for value in self.singular_values)

    @property
    def kept_energy(self) -> float:
        """What the adapter holds of ``energy``."""
        return sum(value**2 for value in self.singular_values[: self.published_rank])


def module_changes(model: Any) -> list[ModuleChange]:
    """Return what the active adapter does to each module it is on, in the model's order.

    Args:
        model: wrapped by PEFT; the adapter is LoRA or any method that can name its ΔW. Modules of
            methods that cannot (that multiply instead of adding) are left out.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = {
        path: module
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    places = places_of(tuned)
    found = []
    for path, module in tuned.items():
        with torch.no_grad():
            sizes = _sizes(module)
        if sizes is None:
            continue
        layer, kind = places[path]
        spectrum = getattr(module, "spectrum", None)
        found.append(
            ModuleChange(
                name=path,
                layer=layer,
                kind=kind,
                weight_norm=sizes[0],
                delta_norm=sizes[1],
                singular_values=sizes[2],
                published_rank=None if spectrum is None else spectrum.rank,
            )
        )
    return found


def places_of(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """Return the number of each module's layer and its kind, as ``ModuleChange`` has them."""
    matches = {name: _LAYER.fullmatch(name) for name in names}
    has_one_stack = len({match["stack"] for match in matches.values() if match}) == 1
    found: dict[str, tuple[int | None, str]] = {}
    for name, match in matches.items():
        if match is None:
            found[name] = (None, name)
            continue
        stack = "" if has_one_stack else f"{match['stack']}. "
        found[name] = (int(match["number"]), f"{stack}{match['rest']}")
    return found


def write_changes(path: Path, changes: Sequence[ModuleChange]) -> None:
    """Write ``weights.json``, a line for each module.

    Singular values have six digits: of whole weights there are thousands in a module.
    """
    rows = [
        {
            "name": one.name,
            "delta_norm": one.delta_norm,
            "weight_norm": one.weight_norm,
            "ratio": one.ratio,
            "effective_rank": one.effective_rank,
            "stable_rank": one.stable_rank,
            "rank_90": one.directions_for(MOST),
            "published_rank": one.published_rank,
            "singular_values": [float(f"{value:.6g}") for value in one.singular_values],
        }
        for one in changes
    ]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.write_text(f'{{"modules": [\n{lines}\n]}}\n', encoding="utf-8")


def read_changes(path: Path) -> list[ModuleChange]:
    """Read what ``write_changes`` wrote.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is no such file.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))["modules"]
    places = places_of(row["name"] for row in rows)
    return [
        ModuleChange(
            name=row["name"],
            layer=places[row["name"]][0],
            kind=places[row["name"]][1],
            delta_norm=float(row["delta_norm"]),
            weight_norm=float(row["weight_norm"]),
            singular_values=tuple(float(value) for value in row["singular_values"]),
            published_rank=row.get("published_rank"),
        )
        for row in rows
    ]


def _sizes(module: Any) -> tuple[float, float, tuple[float, ...]] | None:
    """Return ‖W‖, ‖ΔW‖ and ΔW's singular values; ``None`` if the method has no ΔW."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(module.get_base_layer()).detach().float()
    size = float(weight.norm())
    spectrum = getattr(module, "spectrum", None)
    if spectrum is not None:  # more was trained than the adapter holds (``methods.full``)
        trained = torch.tensor(spectrum.values)
        return size, float(trained.norm()), _not_zero(trained)
    name = module.active_adapters[0]
    # Methods that move the base as well (``methods.shift``) have more of a change than their A and B.
    whole = getattr(module, "whole_change", None)
    if whole is not None:
        b, a = whole()
        return size, *product_sizes(b.float(), a.float(), 1.0)
    magnitude = getattr(module, "lora_magnitude_vector", {})
    pair = getattr(module, "lora_A", {})
    is_plain = name in pair and name not in magnitude
    # AdaLoRA keeps parameters there, and not modules; convolutions have four dimensions.
    if is_plain and isinstance(pair[name], torch.nn.Linear):
        a, b = pair[name].weight.float(), module.lora_B[name].weight.float()
        return size, *product_sizes(b, a, float(module.scaling[name]))
    added = module.get_delta_weight(name) if hasattr(module, "get_delta_weight") else None
    if not isinstance(added, torch.Tensor):
        return None
    delta = added.float().reshape(weight.shape)
    if name in magnitude:
        delta = _with_magnitude(weight, delta, magnitude[name].weight.float())
    matrix = delta.flatten(1)
    is_large = min(matrix.shape) > _MAX_SPECTRUM_SIDE
    values = () if is_large else _not_zero(torch.linalg.svdvals(matrix))
    return size, float(matrix.norm()), values


def product_sizes(b: Tensor, a: Tensor, scale: float) -> tuple[float, tuple[float, ...]]:
    """Return norm and singular values of ``scale · B A`` without forming it.

    With B = Q₁R₁ and Aᵀ = Q₂R₂, BA = Q₁ (R₁R₂ᵀ) Q₂ᵀ: its singular values are those of an r × r matrix.

    Args:
        b: [out, r].
        a: [r, in].
        scale: of the product.
    """
    import torch

    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    values = torch.linalg.svdvals(core) * abs(scale)
    return float(values.norm()), _not_zero(values)


def _with_magnitude(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Return DoRA's ΔW, m · (W + sBA) / ‖W + sBA‖ - W, norms over rows (arXiv 2402.09353, equation 5)."""
    moved = weight + delta
    norms = moved.flatten(1).norm(dim=1)
    scale = (magnitude.flatten() / norms).reshape(-1, *[1] * (weight.dim() - 1))
    changed: Tensor = scale * moved - weight
    return changed


def _not_zero(values: Tensor) -> tuple[float, ...]:
    """Return the values above what rounding leaves of zero."""
    floor = float(values.max()) * 1e-6 if len(values) else 0.0
    return tuple(value for value in values.tolist() if value > floor)
