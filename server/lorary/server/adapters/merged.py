"""A second set of weights for the layers that one adapter changes, with the adapter folded in.

For every layer that the adapter changes, from the base's own files and in float32 (Hu et al. 2021,
arXiv:2106.09685, section 4.1; DoRA: Liu et al. 2024, arXiv:2402.09353, section 4)::

    W' = W0 + B A                       LoRA; the version's scale is in B
    W' = diag(m / |W0 + B A|) (W0 + B A)    DoRA; |.| over a row of [out, in]

then rounded once, to what the base's own weight is kept in: packed, laid side by side, 8 bits, nf4. The base's
weights are never touched, and what the adapter leaves alone is shared with them. A step whose rows all
belong to the adapter multiplies by these weights and adds nothing behind them.

Before anything is folded, the rows that were read are compared with those that are served, by their lengths:
a base whose files are not what its layers hold is not merged.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorary.errors import NotMergeable
from lorary.server.adapters.columns import row_norms
from lorary.server.adapters.weights import GroupWeights

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from lorary.bases.golden import GoldenWeights
    from lorary.server.adapters.layers import LoraGroup
    from lorary.server.adapters.loader import LoadedAdapter
    from lorary.server.native.decoder import FusedModel
    from lorary.server.native.library import NativeKernels

# How far a row's length may be from what the files say, relative to the layer's mean, by what the row was
# rounded to; several times what was seen. Another layer's rows are off by more than any of these.
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-2,
    torch.int8: 5e-2,
    torch.uint8: 2e-1,
}


class MergedWeights:
    """The second set of weights, and the native layers over it where the base's run natively.

    Attributes:
        in_place: weights by group; groups that are not there keep the base's.
        fused: the function of the whole model with these weights, or None.
        num_bytes: what the set takes beside the base.
    """

    def __init__(
        self, in_place: Mapping[LoraGroup, GroupWeights], fused: FusedModel | None
    ) -> None:
        self.in_place = in_place
        self.fused = None if fused is None else fused.with_weights(in_place)
        self.num_bytes = sum(weights.num_bytes for weights in in_place.values())
        self.is_freed = False

    def free(self) -> None:
        """Let go of the weights; no step may run on them any more, now or later."""
        self.in_place, self.fused, self.is_freed = {}, None, True


def merged_bytes(groups: Iterable[LoraGroup], modules: Collection[str]) -> int:
    """Return what ``fold`` takes for an adapter that changes these modules."""
    return sum(_bytes(group, modules) for group in groups)


def fold(
    groups: Sequence[LoraGroup],
    adapter: LoadedAdapter,
    golden: GoldenWeights,
    kernels: NativeKernels | None,
) -> dict[LoraGroup, GroupWeights]:
    """Return the weights of every group that the adapter changes, with the adapter in them.

    One group at a time is in memory in float32.

    Args:
        groups: all of the base's.
        adapter: of this base, checked.
        golden: the base's weights.
        kernels: what the groups were packed with.

    Raises:
        NotMergeable: a module's weight is not in the files, is not the one that is served, is kept in
            a form that cannot be made anew, or is not finite once the adapter is in it.
    """
    with torch.inference_mode():
        return {
            group: _folded(group, adapter, golden, kernels)
            for group in groups
            if any(module in adapter.tensors for module in group.spec.modules)
        }


def _folded(
    group: LoraGroup,
    adapter: LoadedAdapter,
    golden: GoldenWeights,
    kernels: NativeKernels | None,
) -> GroupWeights:
    modules = group.spec.modules
    if group.packed is not None:
        assert kernels is not None, "packed without kernels"
        whole = torch.cat([_member(group, i, adapter, golden) for i in range(len(modules))])
        if group.packed.dtype == torch.int8:
            packed = kernels.pack_int8(whole, group.packed.bias)
        else:
            packed = kernels.pack(whole.to(group.packed.dtype), group.packed.bias)
        return GroupWeights(group.layers, packed.num_bytes, packed=packed)
    if group.weight is not None:
        weight = torch.empty_like(group.weight)
        start = 0
        for i, out in enumerate(group.spec.out_features):
            weight[start : start + out] = _member(group, i, adapter, golden)
            start += out
        return GroupWeights(group.layers, weight.nbytes, weight=weight, bias=group.bias)
    layers = [
        _remade(layer, _member(group, i, adapter, golden), modules[i])
        if modules[i] in adapter.tensors
        else layer
        for i, layer in enumerate(group.layers)
    ]
    return GroupWeights(tuple(layers), _bytes(group, adapter.tensors))


def _member(
    group: LoraGroup, member: int, adapter: LoadedAdapter, golden: GoldenWeights
) -> torch.Tensor:
    """Return one layer's weight with the adapter in it, float32 [out, in]."""
    module = group.spec.modules[member]
    weight = golden.read(module)
    _check_same(group, member, weight)
    pair = adapter.tensors.get(module)
    if pair is None:
        return weight
    a, b = (side.float() for side in pair)
    weight = torch.addmm(weight, b, a)
    magnitude = adapter.magnitudes.get(module)
    if magnitude is not None:
        norms = torch.linalg.vector_norm(weight, dim=1)
        weight *= (magnitude.float() / norms)[:, None]
    if not weight.isfinite().all():
        raise NotMergeable(
            f"module {module}: base and adapter together are not finite, so they cannot be one weight; use "
            "execution BATCHED, or train the adapter again"
        )
    return weight


def _check_same(group: LoraGroup, member: int, weight: torch.Tensor) -> None:
    """Check that a weight read from the files is the one that is served, as far as rounding lets it show."""
    module = group.spec.modules[member]
    shape = group.spec.out_features[member], group.spec.in_features
    if weight.shape == shape:
        nothing = torch.zeros(1, shape[1]), torch.zeros(shape[0], 1)
        served = row_norms(group, member, *nothing).float().cpu()
        found = torch.linalg.vector_norm(weight, dim=1)
        if (served - found).abs().max() <= _tolerance(group, member) * found.mean():
            return
    raise NotMergeable(
        f"module {module}: the base's files hold another weight {list(weight.shape)} than the one that is "
        f"served {list(shape)}, so nothing is folded into it; use execution BATCHED, and check whether the "
        "files were replaced"
    )


def _tolerance(group: LoraGroup, member: int) -> float:
    if group.packed is not None:
        return _TOLERANCE[group.packed.dtype]
    weight: Any = group.layers[member].weight
    return _TOLERANCE.get(weight.dtype, _TOLERANCE[torch.uint8])


def _remade(layer: Any, weight: torch.Tensor, module: str) -> nn.Module:
    """Return a layer like this one with another weight, float32 [out, in], rounded as its own is."""
    old = layer.weight
    other = copy.copy(layer)
    # The copy has the same dictionary of parameters.
    other._parameters = dict(layer._parameters)
    kind = type(old).__name__
    if kind == "Params4bit":
        from bitsandbytes.nn import Params4bit

        other.quant_state = None
        # At its first product on a CPU a layer forgets what it was rounded from.
        state = old.quant_state
        other.weight = Params4bit(
            weight.to(getattr(state, "original_dtype", state.dtype)),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=other,
        ).to(old.device)
        return other  # type: ignore[no-any-return]
    if kind == "Int8Params":
        from bitsandbytes import MatmulLtState
        from bitsandbytes.nn import Int8Params

        other.state = MatmulLtState()
        for name in ("threshold", "has_fp16_weights", "use_pool"):
            setattr(other.state, name, getattr(layer.state, name))
        other.weight = Int8Params(
            weight.to(torch.float16), requires_grad=False, has_fp16_weights=False
        ).to(old.device)
        return other  # type: ignore[no-any-return]
    if not old.is_floating_point() or old.dim() != 2:
        raise NotMergeable(
            f"module {module}: its weight is kept as {kind} of {old.dtype}, which Lorary cannot make anew; use "
            "execution BATCHED, or serve the base unquantized, in int8 or in nf4"
        )
    # GPT-2's layers keep theirs the other way round.
    laid = weight.t() if type(layer).__name__ == "Conv1D" else weight
    other.weight = nn.Parameter(laid.to(old.device, old.dtype).contiguous(), requires_grad=False)
    return other  # type: ignore[no-any-return]


def _bytes(group: LoraGroup, modules: Collection[str]) -> int:
    """Return what a group's weights take once more, where any of its modules is among these."""
    changed = [module in modules for module in group.spec.modules]
    if not any(changed):
        return 0
    if group.packed is not None:
        return group.packed.num_bytes
    if group.weight is not None:
        return group.weight.nbytes
    layers: Any = [
        layer for layer, is_changed in zip(group.layers, changed, strict=True) if is_changed
    ]
    # What quantizers keep beside a weight is a few percent of it.
    return sum(int(layer.weight.nbytes) for layer in layers)
