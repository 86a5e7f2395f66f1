"""A decoder of the Llama kind in one native call, from embeddings to the last norm (semantics in layer.cpp).

The rotary tables (with their scaling) are made by transformers' own module; the head is a call of its own.
The residual stream is float32 from the embeddings on.
"""

from __future__ import annotations

import copy
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorary.server.native.library import NativeKernels
from lorary.server.native.products import BoundKernel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.adapters.layers import LoraGroup
    from lorary.server.adapters.weights import Weights
    from lorary.server.engine.attention import AttentionPlan
    from lorary.server.engine.batch import Batch
    from lorary.server.engine.kv_cache import KVCache
    from lorary.server.native.products import PackedLinear

# Layers whose forward is exactly that of layer.cpp, in models whose forward is exactly embeddings,
# rotary tables, layers, norm; whoever adds one adds its family's test.
FAMILIES = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
# Rotary embeddings whose tables depend on how long the sequences of a step are.
_CHANGING_ROPE = frozenset({"dynamic", "longrope"})
# What keys and values are kept in, by what the layers multiply in; layer.cpp has the same pairs. float16
# takes bfloat16's bytes and has 3 bits more, of which answers gain more than from any other rounding
# (docs/log.md); what does not fit in its range, 65504, is cut off, and keys and values are far from it.
_KEPT = {torch.bfloat16: torch.float16, torch.float32: torch.float32}
# Rests of a row, as in matmul.h.
_RESTS = 4
_PROJECTIONS = ("qkv", "o", "gate_up", "down")
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Projection(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("packed", "scales", "offsets", "bias")),
        ("inputs", _I),
        ("outputs", _I),
        ("a", _P),
        ("b", _P),
        ("outs", _P),
        ("members", _I),
        ("cap", _I),
        ("row_scales", _P),
        ("storage", _I),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in _PROJECTIONS),
        *((name, _P) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "k", "v")),
        ("tables", _P),
        *(
            (name, _I)
            for name in ("width", "hidden", "inner", "kv_heads", "group", "dim", "window")
        ),
        *((name, _F) for name in ("eps", "scale", "softcap")),
    )


class _Chunk(ctypes.Structure):
    _fields_ = (("row", _I), ("length", _I), ("slot", _I), ("start", _I), ("mask", _P))


class _Mix(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("rows", "entry", "rank_indptr", "rank_rows", "rank_scales")),
        ("columns", _P),
        ("num_rows", _I),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", _P),
        ("count", _I),
        *((name, _P) for name in ("embeddings", "cos", "sin", "norm")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", _I),
        ("num_decode", _I),
        *((name, _P) for name in ("tokens", "angles", "slots", "positions", "lengths", "chunks")),
        ("num_chunks", _I),
        ("wanted", _P),
        ("num_wanted", _I),
        ("out", _P),
        ("mix", _Mix),
        *((name, _P) for name in ("hidden", "rounded", "rests", "qkv", "attended", "gate_up")),
        *((name, _P) for name in ("bytes", "scales", "aside")),
        ("threads", ctypes.c_int32),
    )


class _Workspace:
    """Buffers for what a layer hands from one of its parts to the next; shared by all layers."""

    def __init__(self, layer: _Layer, dtype: torch.dtype) -> None:
        widest = max(layer.hidden, layer.o.inputs, layer.inner)
        self._widths = (
            (layer.hidden, torch.float32),
            (widest, dtype),
            # A pair's number and its halves, for each of the rests of a row.
            (2 * _RESTS, torch.int32),
            (layer.qkv.outputs, torch.float32),
            (layer.o.inputs, torch.float32),
            (2 * layer.inner, torch.float32),
            # 8-bit rows of whatever a projection reads, up to three bytes wider; a scale for each 64.
            (widest + 3, torch.uint8),
            (widest // 64 + 1, torch.float32),
            (layer.hidden, torch.float32),
        )
        self._rows = 0
        self.buffers: tuple[torch.Tensor, ...] = ()
        """What the addresses belong to; others from the next step on that has more rows."""
        self._pointers: tuple[int, ...] = ()

    def pointers(self, rows: int) -> tuple[int, ...]:
        """Return the addresses of buffers for at least ``rows`` rows."""
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
            self.buffers = tuple(
                torch.empty(self._rows * width, dtype=dtype) for width, dtype in self._widths
            )
            self._pointers = tuple(buffer.data_ptr() for buffer in self.buffers)
        return self._pointers


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer as layer.cpp reads it, its projections' groups, and the tensors that it points into."""

    structure: _Layer
    groups: tuple[LoraGroup, ...]
    tensors: tuple[object, ...]

    def with_weights(self, in_place: Mapping[LoraGroup, Weights]) -> FusedLayer:
        """Return this layer with other weights for some of its groups; all else is shared."""
        structure = _Layer.from_buffer_copy(self.structure)
        kept: list[object] = [self.tensors]
        for name, group in zip(_PROJECTIONS, self.groups, strict=True):
            if group in in_place:
                packed = in_place[group].packed
                assert packed is not None, "weights for a packed group that are not"
                _point(getattr(structure, name), packed)
                kept.append(packed)
        return FusedLayer(structure, self.groups, tuple(kept))


@dataclass(frozen=True, slots=True)
class NativeStep:
    """A step as layer.cpp reads it, for as long as its batch's tensors stay where they are.

    Attributes:
        address: of the structure.
        normed: float32 [L, hidden], what the head reads.
        hidden: float32 [H, hidden], what the head would read of the rows whose hidden states are wanted.
        head: the arguments of the head's function, where it is packed.
        logits: float32 [L, vocab], what it writes; None where it is not packed, and for a greedy step.
        found: likewise the most likely tokens [L] of a greedy step, whose logits are never written.
        held: the structure, and what it points into beside the batch.
    """

    address: int
    normed: torch.Tensor
    hidden: torch.Tensor
    head: tuple[object, ...]
    logits: torch.Tensor | None
    found: ctypes.Array[ctypes.c_int64] | None
    held: tuple[object, ...]


class FusedModel:
    """From token ids to logits and hidden states: embeddings, layers and norm in one call, then the head.

    Args:
        model: the transformers model whose layers these are.
        layers: in order.
        cache: keys and values, in ``kept_dtype``.
        kernels: have the layers' function.
        dtype: what the layers multiply in.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[FusedLayer],
        cache: KVCache,
        kernels: NativeKernels,
        dtype: torch.dtype,
    ) -> None:
        inner = getattr(model, model.base_model_prefix)
        structures = [layer.structure for layer in layers]
        self._rotary = inner.rotary_emb
        self._head = model.get_output_embeddings()
        self._packed_head: PackedLinear | None = getattr(self._head, "packed", None)
        if self._packed_head is not None:
            self._head_function = self._packed_head.function(torch.float32)
            self._largest_function: Any = self._packed_head.largest
        self._width = structures[0].hidden
        self._function = kernels.layers_function(dtype)
        self._workspace = _Workspace(structures[0], dtype)
        assert ctypes.c_float(inner.norm.variance_epsilon).value == structures[0].eps
        self._norm = inner.norm.weight.data.float().contiguous()
        self._embeddings = inner.embed_tokens.weight.data.to(dtype).contiguous()
        self._changes_rope = self._rotary.rope_type in _CHANGING_ROPE
        self._structure = _Model()
        self._set_layers(layers)
        if not self._changes_rope:
            self._set_angles(torch.arange(cache.shape.context)[None])

    def with_weights(self, in_place: Mapping[LoraGroup, Weights]) -> FusedModel:
        """Return the same function with other weights for some groups of its layers.

        Everything else is shared, the workspace too: only one of them may run at a time.
        """
        other = copy.copy(self)
        other._structure = _Model.from_buffer_copy(self._structure)
        other._set_layers([layer.with_weights(in_place) for layer in self._layers])
        return other

    def _set_layers(self, layers: Sequence[FusedLayer]) -> None:
        # Held, as the structures point into their tensors.
        self._layers = tuple(layers)
        structures = [layer.structure for layer in layers]
        self._addresses = (_P * len(layers))(*map(ctypes.addressof, structures))
        self._structure.layers, self._structure.count = (
            ctypes.addressof(self._addresses),
            len(layers),
        )
        self._structure.embeddings = self._embeddings.data_ptr()
        self._structure.norm = self._norm.data_ptr()
        self._address = ctypes.addressof(self._structure)

    def forward(self, batch: Batch) -> torch.Tensor | list[int]:
        """Run one step; write its keys and values into the cache.

        Returns:
            Float32 logits [L, vocab] of ``batch.logits_rows``, which those of the same batch, advanced,
            overwrite; of a greedy step the L tokens where they are largest, for then they are never
            written.
        """
        if self._changes_rope:
            self._set_angles(batch.position_ids)
        step = batch.native
        if step is None:
            step = self._lay_out(batch)
            # What reads prompts is never advanced, and its logits may be large.
            batch.native = None if batch.plan.chunks else step
        self._function(self._address, step.address)
        if batch.embedders:
            batch.hidden = step.hidden
        if step.found is not None:
            self._largest_function(*step.head)
            return step.found[:]
        if step.logits is not None:
            self._head_function(*step.head)
            return step.logits
        logits: torch.Tensor = self._head(step.normed)
        return logits.float()

    def _lay_out(self, batch: Batch) -> NativeStep:
        plan, positions, wanted = batch.plan, batch.position_ids, batch.logits_rows
        rows, num_logits = positions.numel(), wanted.numel()
        if batch.embedders:
            wanted = torch.cat((wanted, batch.hidden_rows))
        normed = torch.empty(wanted.numel(), self._width)
        chunks = _chunks(plan)
        step = _Step(
            rows,
            plan.num_decode,
            batch.token_ids.data_ptr(),
            None if self._changes_rope else positions.data_ptr(),
            plan.slots.data_ptr(),
            plan.positions.data_ptr(),
            plan.lengths.data_ptr(),
            ctypes.addressof(chunks),
            len(chunks),
            wanted.data_ptr(),
            wanted.numel(),
            normed.data_ptr(),
            _Mix() if batch.segments is None else _Mix(*batch.segments.addresses),
            *self._workspace.pointers(rows),
            torch.get_num_threads(),
        )
        address, held = ctypes.addressof(step), (step, chunks, wanted, self._workspace.buffers)
        normed, hidden = normed[:num_logits], normed[num_logits:]
        packed = self._packed_head
        if packed is None:
            return NativeStep(address, normed, hidden, (), None, None, held)
        if batch.is_greedy:
            found = (ctypes.c_int64 * num_logits)()
            head = packed.largest_arguments(normed, found)
            return NativeStep(address, normed, hidden, head, None, found, held)
        logits = torch.empty(num_logits, packed.out_features)
        head = packed.arguments(normed, logits)
        return NativeStep(address, normed, hidden, head, logits, None, held)

    def _set_angles(self, positions: torch.Tensor) -> None:
        """Make the rotary tables of positions int64 [1, n]."""
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), positions)
        self._angles = cos[0].contiguous(), sin[0].contiguous()
        self._structure.cos, self._structure.sin = (table.data_ptr() for table in self._angles)


def _chunks(plan: AttentionPlan) -> ctypes.Array[_Chunk]:
    return (_Chunk * len(plan.chunks))(
        *(
            _Chunk(c.row, c.length, c.slot, c.start, None if c.tree is None else c.tree.data_ptr())
            for c in plan.chunks
        )
    )


def kept_dtype(
    model: Any, groups: Sequence[LoraGroup], kernels: NativeKernels, dtype: torch.dtype
) -> torch.dtype | None:
    """Return what the cache of a model that ``fuse`` takes keeps keys and values in.

    ``groups`` are its linear layers, ``dtype`` is what they multiply in.

    Returns:
        The dtype; None when ``fuse`` does not take the model, because a layer is not of a known family,
        has a projection that is not packed (a quantized base), another activation than SiLU, a rotary
        embedding of a part of the head, or a dtype without a kernel.
    """
    layers = getattr(getattr(model, model.base_model_prefix, None), "layers", None)
    if layers is None or not kernels.supports_layers(dtype):
        return None
    by_module = {name: group for group in groups for name in group.spec.modules}
    names = {id(module): name for name, module in model.named_modules()}
    is_known = all(_parts(layer, names[id(layer)], by_module, dtype) for layer in layers)
    return _KEPT[dtype] if is_known else None


def fuse(
    model: Any,
    groups: Sequence[LoraGroup],
    cache: KVCache,
    kernels: NativeKernels,
    dtype: torch.dtype,
) -> FusedModel:
    """Make one function of a model whose linear layers are ``groups``; ``cache`` is of ``kept_dtype``."""
    expected = tuple(map(ctypes.sizeof, (_Layer, _Model, _Step)))
    assert kernels.structure_bytes == expected, "layer.cpp has other structures"
    assert cache.k.dtype == _KEPT[dtype], f"a cache of {cache.k.dtype} for layers in {dtype}"
    by_module = {name: group for group in groups for name in group.spec.modules}
    names = {id(module): name for name, module in model.named_modules()}
    layers = [
        _fused(layer, _parts(layer, names[id(layer)], by_module, dtype), cache)
        for layer in getattr(model, model.base_model_prefix).layers
    ]
    return FusedModel(model, layers, cache, kernels, dtype)


def _parts(
    layer: Any, name: str, groups: dict[str, LoraGroup], dtype: torch.dtype
) -> list[LoraGroup]:
    """Return a layer's projections: q/k/v, o, gate/up, down; none when layer.cpp is not its forward."""
    config = layer.self_attn.config if type(layer).__name__ in FAMILIES else None
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        return []
    if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return []
    paths = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    parts = [groups[path] for path in (f"{name}.{path}" for path in paths) if path in groups]
    if [len(group.layers) for group in parts] != [3, 1, 2, 1]:
        return []
    is_packed = all(g.packed is not None and g.packed.dtype in (dtype, torch.int8) for g in parts)
    return parts if is_packed else []


def _fused(layer: Any, parts: Sequence[LoraGroup], cache: KVCache) -> FusedLayer:
    attention, config = layer.self_attn, layer.self_attn.config
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, n, None) for n in ("q_norm", "k_norm")]
    weights = [None if norm is None else norm.weight.data.float().contiguous() for norm in norms]
    index = int(attention.layer_idx)
    k, v = cache.k[index], cache.v[index]
    projections, kept = zip(*map(_projection, parts), strict=True)
    window = getattr(attention, "sliding_window", None)
    if type(layer).__name__ == "MistralDecoderLayer":
        window = getattr(config, "sliding_window", None)
    structure = _Layer(
        *projections,
        *(None if w is None else w.data_ptr() for w in weights),
        k.data_ptr(),
        v.data_ptr(),
        cache.tables.data_ptr(),
        cache.tables.shape[1],
        projections[0].inputs,
        projections[3].inputs,
        cache.shape.num_kv_heads,
        config.num_attention_heads // cache.shape.num_kv_heads,
        cache.shape.head_dim,
        window or 0,
        norms[0].variance_epsilon,
        attention.scaling,
        0.0,
    )
    return FusedLayer(structure, tuple(parts), (weights, k, v, cache.tables, kept))


def _projection(group: LoraGroup) -> tuple[_Projection, tuple[object, ...]]:
    """Return a group's structure, and what it points into."""
    packed, bound = group.packed, group.bound
    assert packed is not None
    assert isinstance(bound, BoundKernel), "a packed group without the kernel for its adapters"
    structure = _Projection(
        inputs=packed.in_features,
        outputs=packed.out_features,
        a=bound.a_address,
        b=bound.b_address,
        outs=bound.outs_address,
        members=bound.members,
        cap=bound.cap,
        row_scales=bound.scales_address,
        storage=bound.storage,
    )
    _point(structure, packed)
    return structure, (packed, bound)


def _point(projection: Any, packed: PackedLinear) -> None:
    """Let a projection multiply by these weights."""
    projection.packed, projection.bias = packed.address, packed.bias_address
    projection.scales, projection.offsets = packed.scales_address, packed.offsets_address
