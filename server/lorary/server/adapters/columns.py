"""DoRA's column scales: a version's magnitudes over the norms that base and change have together.

DoRA (Liu et al. 2024, arXiv:2402.09353, section 4) gives every output i of a layer a length m_i of its own::

    W' = diag(c) (W0 + B A),    c_i = m_i / |(W0 + B A)_i|        |.| over a row of [out, in]

so y = c * (W0 x + B A x) + bias: an adapter like any other, and one factor per output behind it. Only c needs
the base's weights. It is computed once, when a version is loaded, from the base as it is served: where that
is rounded, from the rounded weights, as PEFT does.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from lorary.errors import IncompatibleAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.adapters.layers import LoraGroup
    from lorary.server.adapters.loader import LoadedAdapter

# Elements of a weight that are looked at in float32 at once: a load must not be a peak of memory.
_AT_ONCE = 1 << 21


def column_scales(groups: Sequence[LoraGroup], adapter: LoadedAdapter) -> dict[str, torch.Tensor]:
    """Return float32 [out] for every module that has magnitudes, on the base's device.

    Raises:
        IncompatibleAdapter: a row of base and change is zeros, so that it has no direction, or the base's
            weights are kept in a form that cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for group in groups:
            for member, module in enumerate(group.spec.modules):
                if module in adapter.magnitudes:
                    found[module] = _scales(group, member, adapter)
    return found


def _scales(group: LoraGroup, member: int, adapter: LoadedAdapter) -> torch.Tensor:
    module = group.spec.modules[member]
    norms = row_norms(group, member, *adapter.tensors[module])
    scales = adapter.magnitudes[module].to(norms) / norms
    if not scales.isfinite().all():
        row = int(scales.isfinite().logical_not().nonzero()[0])
        raise IncompatibleAdapter(
            f"module {module}: output {row} of base and change together has length {float(norms[row]):g}, "
            "so DoRA's magnitude has nothing to scale. The adapter was trained on another base, or its "
            "training diverged."
        )
    return scales


def row_norms(group: LoraGroup, member: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return |W + B A| of a member's rows, float32 [out]; a [r, in], b [out, r]."""
    first = sum(group.spec.out_features[:member])
    if group.packed is not None:
        return group.packed.norms(first, a, b)
    if group.weight is not None:
        weight = group.weight[first : first + b.shape[0]]
    else:
        weight = _weight(group.layers[member], group.spec.modules[member])
    step = max(1, _AT_ONCE // group.spec.in_features)
    a, found = a.to(weight.device, torch.float32), []
    for rows, some_b in zip(torch.split(weight, step), torch.split(b, step), strict=True):
        changed = torch.addmm(rows.float(), some_b.to(a), a)
        found.append(torch.linalg.vector_norm(changed, dim=1))
    return torch.cat(found)


def _dequantized(data: torch.Tensor, state: Any) -> torch.Tensor:
    """Return a 4-bit weight [out, in] as it is multiplied, without changing it."""
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):
        # At its first product on a CPU a layer lays its weight out anew, which dequantizing knows nothing of.
        scales = state.absmax.t().reshape(-1).float()
        unpack = functional._convert_weight_packed_for_cpu_inverse
        data, state = unpack(data, copy.copy(state))
        state.absmax, state.nested = scales, False
    whole: torch.Tensor = functional.dequantize_4bit(data, state)
    return whole


def _weight(layer: Any, module: str) -> torch.Tensor:
    """Return the weight [out, in] of a layer with a product of its own, in whatever dtype."""
    weight: torch.Tensor = layer.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _dequantized(weight.data, layer.weight.quant_state)
    if kind == "Int8Params":
        # The layer takes its weight's scales for itself at its first product.
        own = layer.weight.SCB
        scales: torch.Tensor = layer.state.SCB if own is None else own
        return weight.data.float() * (scales.float()[:, None] / 127)
    if not weight.is_floating_point() or weight.dim() != 2:
        raise IncompatibleAdapter(
            f"module {module}: its weight is kept as {kind} of {weight.dtype}, which cannot be read, and "
            "DoRA needs its norms. Serve the base unquantized, in int8 or in nf4."
        )
    # GPT-2's layers keep theirs the other way round.
    return weight.data.t() if type(layer).__name__ == "Conv1D" else weight.data
