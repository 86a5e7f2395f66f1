"""Whole decoder layers of the Llama kind in one native call each (semantics in layer.cpp).

``fuse`` replaces the layers of a transformers model by ``FusedLayer``; embeddings, rotary tables
(with their scaling), the loop over the layers, the last norm and the head stay transformers' own. The
residual stream is float32 from the embeddings on.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorary.server.native.library import NativeKernels
from lorary.server.native.products import BoundKernel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorary.server.adapters.layers import LoraGroup
    from lorary.server.adapters.segments import Segments
    from lorary.server.engine.attention import AttentionPlan
    from lorary.server.engine.kv_cache import KVCache

# Layers whose forward is exactly that of layer.cpp; whoever adds one adds its family's test.
FAMILIES = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
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
        *(
            (name, _I)
            for name in ("hidden", "inner", "kv_heads", "group", "dim", "context", "window")
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


_current: ContextVar[_Step | None] = ContextVar("lorary_native_step", default=None)


class FusedLayer(nn.Module):
    """Stands where a decoder layer stood; holds its tensors alive."""

    def __init__(self, function: Any, layer: _Layer, tensors: tuple[object, ...]) -> None:
        super().__init__()
        self._function = function
        self.structure = layer
        self._address = ctypes.addressof(layer)
        self._tensors = tensors

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_unused: object,
    ) -> torch.Tensor:
        """Run the layer over the step's rows; hidden_states float32 [1, T, hidden], in place.

        ``position_embeddings`` are cos and sin, float32 [1, T, dim].
        """
        step = _current.get()
        assert step is not None, "a layer outside of a step"
        cos, sin = position_embeddings
        assert hidden_states.dtype == cos.dtype == torch.float32
        assert cos.shape[-1] == self.structure.dim, "rotary embedding of a part of the head"
        self._function(
            self._address,
            ctypes.addressof(step),
            cos.data_ptr(),
            sin.data_ptr(),
            hidden_states.data_ptr(),
        )
        return hidden_states


class FusedModel:
    """What a model with fused layers needs in every step."""

    def __init__(self, layer: FusedLayer, dtype: torch.dtype) -> None:
        self._workspace = _Workspace(layer.structure, dtype)

    @contextmanager
    def step(self, plan: AttentionPlan, segments: Segments | None) -> Iterator[None]:
        """Make this step that of every layer within the block, on this thread."""
        rows = plan.slots.numel()
        chunks = (_Chunk * len(plan.chunks))(
            *(
                _Chunk(
                    c.row, c.length, c.slot, c.start, None if c.tree is None else c.tree.data_ptr()
                )
                for c in plan.chunks
            )
        )
        mix = _Mix() if segments is None else _Mix(*segments.addresses)
        step = _Step(
            rows,
            plan.num_decode,
            plan.slots.data_ptr(),
            plan.positions.data_ptr(),
            plan.lengths.data_ptr(),
            ctypes.addressof(chunks),
            len(chunks),
            mix,
            *self._workspace.pointers(rows),
            torch.get_num_threads(),
        )
        token = _current.set(step)
        try:
            yield
        finally:
            _current.reset(token)


def fuse(
    model: Any, groups: Sequence[LoraGroup], cache: KVCache, kernels: NativeKernels
) -> FusedModel | None:
    """Replace the decoder layers of a model whose linear layers are ``groups``, in place.

    Returns:
        The fused model; None when a layer is not of a known family, has a projection that is not
        packed (a quantized base), another activation than SiLU, or a dtype without a kernel. Nothing
        is changed then.
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
        made = _fused(layer, names[id(layer)], by_module, cache, kernels)
        if made is None:
            return None
        fused.append(made)
    inner.layers = nn.ModuleList(fused)
    # Residual stream and rotary tables take the dtype of the embeddings' output.
    model.get_input_embeddings().register_forward_hook(lambda _m, _x, output: output.float())
    return FusedModel(fused[0], dtype)


def _fused(
    layer: Any, name: str, groups: dict[str, LoraGroup], cache: KVCache, kernels: NativeKernels
) -> FusedLayer | None:
    if type(layer).__name__ not in FAMILIES:
        return None
    attention, config = layer.self_attn, layer.self_attn.config
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
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
        projections[0].inputs,
        projections[3].inputs,
        cache.shape.num_kv_heads,
        config.num_attention_heads // cache.shape.num_kv_heads,
        cache.shape.head_dim,
        cache.shape.context,
        window or 0,
        norms[0].variance_epsilon,
        attention.scaling,
        0.0,
    )
    return FusedLayer(kernels.layer_function(k.dtype), structure, (weights, k, v, kept))


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
