"""All decoder layers of the Llama kind in one native call (semantics in layer.cpp).

Embeddings, rotary tables (with their scaling) and the head are transformers' own modules; what the
model's own forward does between them is done here. The residual stream is float32 from the embeddings on.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorary.server.native.library import NativeKernels
from lorary.server.native.products import BoundKernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.adapters.layers import LoraGroup
    from lorary.server.engine.attention import AttentionPlan
    from lorary.server.engine.batch import Batch
    from lorary.server.engine.kv_cache import KVCache

# Layers whose forward is exactly that of layer.cpp, in models whose forward is exactly embeddings,
# rotary tables, layers, norm; whoever adds one adds its family's test.
FAMILIES = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
# Rotary embeddings whose tables depend on how long the sequences of a step are.
_CHANGING_ROPE = frozenset({"dynamic", "longrope"})
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
        *((name, _Projection) for name in ("qkv", "o", "gate_up", "down")),
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
        ("num_rows", _I),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", _I),
        ("num_decode", _I),
        *((name, _P) for name in ("slots", "positions", "lengths", "chunks")),
        ("num_chunks", _I),
        ("mix", _Mix),
        *((name, _P) for name in ("normed", "qkv", "attended", "gate_up", "gated")),
        *((name, _P) for name in ("bytes", "scales")),
        ("threads", ctypes.c_int32),
    )


class _Workspace:
    """Buffers for what a layer hands from one of its parts to the next; shared by all layers."""

    def __init__(self, layer: _Layer, dtype: torch.dtype) -> None:
        widest = max(layer.hidden, layer.o.inputs, layer.inner)
        self._widths = (
            (layer.hidden, dtype),
            (layer.qkv.outputs, torch.float32),
            (layer.o.inputs, dtype),
            (2 * layer.inner, torch.float32),
            (layer.inner, dtype),
            # 8-bit rows of whatever a projection reads, up to three bytes wider; a scale for each 64.
            (widest + 3, torch.uint8),
            (widest // 64 + 1, torch.float32),
        )
        self._rows = 0
        self._buffers: tuple[torch.Tensor, ...] = ()

    def pointers(self, rows: int) -> tuple[int, ...]:
        """Return the addresses of buffers for at least ``rows`` rows."""
        if rows > self._rows:
            self._rows = max(rows, 2 * self._rows)
            self._buffers = tuple(
                torch.empty(self._rows * width, dtype=dtype) for width, dtype in self._widths
            )
        return tuple(buffer.data_ptr() for buffer in self._buffers)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer as layer.cpp reads it, and the tensors that it points into."""

    structure: _Layer
    tensors: tuple[object, ...]


class FusedModel:
    """From token ids to logits: embeddings, all layers in one call, head.

    Args:
        model: the transformers model whose layers these are.
        layers: in order.
        cache: keys and values, of the layers' dtype.
        kernels: have the layers' function.
    """

    def __init__(
        self, model: Any, layers: Sequence[FusedLayer], cache: KVCache, kernels: NativeKernels
    ) -> None:
        inner = getattr(model, model.base_model_prefix)
        self._embed, self._rotary = inner.embed_tokens, inner.rotary_emb
        self._head = model.get_output_embeddings()
        self._norm = inner.norm.weight.data.float().contiguous()
        assert ctypes.c_float(inner.norm.variance_epsilon).value == layers[0].structure.eps
        self._layers = tuple(layers)
        self._addresses = (_P * len(layers))(*(ctypes.addressof(x.structure) for x in layers))
        self._dtype = cache.k.dtype
        self._function = kernels.layers_function(self._dtype)
        self._workspace = _Workspace(layers[0].structure, self._dtype)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        if self._rotary.rope_type not in _CHANGING_ROPE:
            positions = torch.arange(cache.shape.context)
            cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), positions[None])
            self._tables = cos[0].contiguous(), sin[0].contiguous()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Run one step and return float32 logits [L, vocab] of ``batch.logits_rows``.

        Writes the step's keys and values into the cache.
        """
        hidden = self._embed(batch.token_ids[0]).float()
        cos, sin = self._rope(batch.position_ids)
        count, width = batch.logits_rows.numel(), hidden.shape[1]
        normed = torch.empty(count, width, dtype=self._dtype)
        # Held by a name until the call is over, as all that the step points into.
        chunks = _chunks(batch.plan)
        step = self._step(batch, chunks)
        self._function(
            self._addresses,
            len(self._layers),
            ctypes.addressof(step),
            cos.data_ptr(),
            sin.data_ptr(),
            hidden.data_ptr(),
            self._norm.data_ptr(),
            batch.logits_rows.data_ptr(),
            count,
            normed.data_ptr(),
        )
        logits: torch.Tensor = self._head(normed)
        return logits.float()

    def _rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, float32 [T, dim], for positions int64 [1, T]."""
        if self._tables is not None:
            cos, sin = self._tables
            return cos.index_select(0, positions[0]), sin.index_select(0, positions[0])
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), positions)
        return cos[0].contiguous(), sin[0].contiguous()

    def _step(self, batch: Batch, chunks: ctypes.Array[_Chunk]) -> _Step:
        plan = batch.plan
        rows = plan.slots.numel()
        return _Step(
            rows,
            plan.num_decode,
            plan.slots.data_ptr(),
            plan.positions.data_ptr(),
            plan.lengths.data_ptr(),
            ctypes.addressof(chunks),
            len(chunks),
            _Mix() if batch.segments is None else _Mix(*batch.segments.addresses),
            *self._workspace.pointers(rows),
            torch.get_num_threads(),
        )


def _chunks(plan: AttentionPlan) -> ctypes.Array[_Chunk]:
    return (_Chunk * len(plan.chunks))(
        *(
            _Chunk(c.row, c.length, c.slot, c.start, None if c.tree is None else c.tree.data_ptr())
            for c in plan.chunks
        )
    )


def fuse(
    model: Any, groups: Sequence[LoraGroup], cache: KVCache, kernels: NativeKernels
) -> FusedModel | None:
    """Make one function of a model whose linear layers are ``groups``.

    Returns:
        The fused model; None when a layer is not of a known family, has a projection that is not
        packed (a quantized base), another activation than SiLU, a rotary embedding of a part of the
        head, or a dtype without a kernel.
    """
    expected = (ctypes.sizeof(_Layer), ctypes.sizeof(_Step))
    assert kernels.structure_bytes == expected, "layer.cpp has other structures"
    inner: Any = getattr(model, model.base_model_prefix, None)
    layers = getattr(inner, "layers", None)
    dtype = cache.k.dtype
    if layers is None or not kernels.supports_layers(dtype):
        return None
    by_module = {name: group for group in groups for name in group.spec.modules}
    names = {id(module): name for name, module in model.named_modules()}
    fused: list[FusedLayer] = []
    for layer in layers:
        made = _fused(layer, names[id(layer)], by_module, cache)
        if made is None:
            return None
        fused.append(made)
    return FusedModel(model, fused, cache, kernels)


def _fused(
    layer: Any, name: str, groups: dict[str, LoraGroup], cache: KVCache
) -> FusedLayer | None:
    if type(layer).__name__ not in FAMILIES:
        return None
    attention, config = layer.self_attn, layer.self_attn.config
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        return None
    if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return None
    parts = [
        groups.get(f"{name}.{path}")
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    if [len(g.layers) if g is not None else 0 for g in parts] != [3, 1, 2, 1]:
        return None
    if any(
        g is None or g.packed is None or g.packed.dtype not in (cache.k.dtype, torch.int8)
        for g in parts
    ):
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, n, None) for n in ("q_norm", "k_norm")]
    weights = [None if norm is None else norm.weight.data.float().contiguous() for norm in norms]
    index = int(attention.layer_idx)
    k, v = cache.k[index], cache.v[index]
    projections, kept = zip(*(_projection(g) for g in parts if g is not None), strict=True)
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
    return FusedLayer(structure, (weights, k, v, cache.tables, kept))


def _projection(group: LoraGroup) -> tuple[_Projection, tuple[object, ...]]:
    """Return a group's structure, and what it points into."""
    packed, bound = group.packed, group.bound
    assert packed is not None
    assert isinstance(bound, BoundKernel), "a packed group without the kernel for its adapters"
    structure = _Projection(
        packed.address,
        packed.scales_address,
        packed.offsets_address,
        packed.bias_address,
        packed.in_features,
        packed.out_features,
        bound.a_address,
        bound.b_address,
        bound.outs_address,
        bound.members,
        bound.cap,
        bound.scales_address,
        bound.storage,
    )
    return structure, (packed, bound)
