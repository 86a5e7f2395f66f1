"""From a verified folder to tensors for the pool: check everything first, then touch anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safetensors import safe_open

from lorary.errors import IncompatibleAdapter
from lorary.registry.tensor_layout import lora_key, magnitude_key
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from lorary.registry import BaseCard


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """A version's tensors, checked.

    Attributes:
        rank: the largest rank of any module.
        tensors: per full module name A [r, in] and B [out, r], with the scale folded into B.
        magnitudes: DoRA's, per module [out]; none for plain LoRA.
    """

    rank: int
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)


def load_adapter(
    folder: Path, card: BaseCard, *, modules: frozenset[str], max_rank: int
) -> LoadedAdapter:
    """Read a canonical version.

    Args:
        folder: what ``Registry.fetch`` returned: hashes are verified, the content is not trusted.
        card: the resident base's shapes.
        modules: full names of the layers that take adapters here.
        max_rank: largest rank this server accepts.

    Raises:
        CorruptArtifact: damaged or hostile content.
        IncompatibleAdapter: another base, too high a rank, or a module that is not served.
    """
    spec = validate_adapter(folder, card, max_rank=max_rank)
    foreign = sorted(spec.modules.keys() - modules)
    if foreign:
        raise IncompatibleAdapter(
            f"the adapter changes {foreign[:3]}{'…' if len(foreign) > 3 else ''}, which this server "
            "does not serve with adapters; train it without these modules"
        )
    tensors, magnitudes = {}, {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for module, (_, scale) in spec.modules.items():
            a, b = (file.get_tensor(lora_key(module, side)) for side in "AB")
            tensors[module] = (a, b if scale == 1.0 else b * scale)
            if spec.magnitudes:
                magnitudes[module] = file.get_tensor(magnitude_key(module))
    return LoadedAdapter(rank=spec.rank, tensors=tensors, magnitudes=magnitudes)
