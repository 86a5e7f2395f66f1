"""From a verified folder to tensors for the pool: check everything first, then touch anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import safe_open

from lorary.errors import IncompatibleAdapter
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lorary.registry import BaseCard

    Tensors = dict[str, tuple[torch.Tensor, torch.Tensor]]

_PREFIX = "base_model.model."


def load_adapter(
    folder: Path, card: BaseCard, *, modules: frozenset[str], max_rank: int
) -> tuple[int, Tensors]:
    """Read a canonical version.

    Args:
        folder: what ``Registry.fetch`` returned: hashes are verified, the content is not trusted.
        card: the resident base's shapes.
        modules: full names of the layers that take adapters here.
        max_rank: largest rank this server accepts.

    Returns:
        The largest rank, and per module A [r, in] and B [out, r] with the scale folded into B.

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
    tensors: Tensors = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for module, (_, scale) in spec.modules.items():
            a = file.get_tensor(f"{_PREFIX}{module}.lora_A.weight")
            b = file.get_tensor(f"{_PREFIX}{module}.lora_B.weight")
            tensors[module] = (a, b if scale == 1.0 else b * scale)
    return spec.rank, tensors
