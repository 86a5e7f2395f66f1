"""A decoder in one native call, from embeddings to the last norm (semantics in layer.cpp).

``families`` reads a model into what is built here. The rotary tables (with their scaling) are made by
transformers' own module; the head is a call of its own. The residual stream is float32 from the embeddings on.
"""

from __future__ import annotations

import copy
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorary.errors import ConfigError
from lorary.server.native.families import FAMILIES, ModelForm, read_model
from lorary.server.native.products import BoundKernel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.adapters.layers import LoraGroup
    from lorary.server.adapters.weights import Weights
    from lorary.server.engine.attention import AttentionPlan
    from lorary.server.engine.batch import Batch
    from lorary.server.engine.kv_cache import KVCache
    from lorary.server.native.families import LayerForm, Norm
    from lorary.server.native.library import NativeKernels
    from lorary.server.native.products import PackedLinear

# Rotary embeddings whose tables depend on how long the sequences of a step are.
_CHANGING_ROPE = frozenset({"dynamic", "longrope"})
# What keys and values are kept in, by what the layers multiply in; layer.cpp has the same pairs. float16
# takes bfloat16's bytes and has 3 bits more, of which answers gain more than from any other rounding
# (docs/log.md); what does not fit in its range, 65504, is cut off, and keys and values are far from it.
_KEPT = {torch.bfloat16: torch.float16, torch.float32: torch.float32}
# Rests of a row, as in matmul.h.
_RESTS = 4
_PROJECTIONS = ("qkv", "o", "up", "down")
_NORMS = ("attention_norm", "attention_after", "mlp_norm", "mlp_after", "q_norm", "k_norm")
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


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _P), ("bias", _P), ("eps", _F), ("is_centred", ctypes.c_int32))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in _PROJECTIONS),
        *((name, _Norm) for name in _NORMS),
        *((name, _P) for name in ("k", "v", "tables")),
        *(
            (name, _I)
            for name in ("width", "hidden", "inner", "kv_heads", "group", "dim", "window")
        ),
        *((name, _I) for name in ("rotation", "activation", "is_parallel", "has_wide_norms")),
        *((name, _F) for name in ("scale", "softcap", "residual")),
    )


class _Rotation(ctypes.Structure):
    _fields_ = (("cos", _P), ("sin", _P), ("dim", _I), ("is_interleaved", _I))


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
        *((name, _P) for name in ("embeddings", "positions", "rotations", "residuals")),
        ("shared", _I),
        ("norm", _Norm),
        ("embedding_scale", _F),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", _I),
        ("num_decode", _I),
        ("first", _I),
        *((name, _P) for name in ("tokens", "angles", "slots", "positions", "lengths", "chunks")),
        ("num_chunks", _I),
        ("wanted", _P),
        ("num_wanted", _I),
        ("out", _P),
        ("mix", _Mix),
        *((name, _P) for name in ("hidden", "rounded", "rests", "qkv", "attended", "up")),
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
            (layer.up.outputs, torch.float32),
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
        form: the model.
        cache: keys and values, in ``kept_dtype``.
        kernels: have the layers' function.
        dtype: what the layers multiply in.

    Raises:
        ConfigError: the cache has more positions than the model has learned.
    """

    def __init__(
        self, form: ModelForm, cache: KVCache, kernels: NativeKernels, dtype: torch.dtype
    ) -> None:
        context = cache.shape.context
        if form.positions is not None and context > len(form.positions):
            raise ConfigError(
                f"a context of {context} tokens is more than the {len(form.positions)} positions that this "
                "base has learned; lower --max-context"
            )
        self._rotary = form.rotary
        self._ropes = list(dict.fromkeys(x.rope for x in form.layers if x.rope is not None))
        kinds = self._rotary.rope_type if self._ropes else ""
        self._changes_rope = not _CHANGING_ROPE.isdisjoint(
            kinds.values() if isinstance(kinds, dict) else {kinds}
        )
        self._head = form.head
        self._packed_head: PackedLinear | None = getattr(self._head, "packed", None)
        if self._packed_head is not None:
            self._head_function = self._packed_head.function(torch.float32)
            self._largest_function: Any = self._packed_head.largest
        self._logits_factor, self._logits_softcap = form.logits_factor, form.logits_softcap
        layers = [_fused(layer, form.num_heads, cache, self._ropes) for layer in form.layers]
        self._width = layers[0].structure.hidden
        self._function = kernels.layers_function(dtype)
        self._workspace = _Workspace(layers[0].structure, dtype)
        embeddings = form.embeddings.to(dtype).contiguous()
        positions = None if form.positions is None else form.positions.to(dtype).contiguous()
        rotations = [_Rotation(is_interleaved=form.is_interleaved) for _ in self._ropes]
        self._rotations = (_Rotation * len(rotations))(*rotations)
        self._structure = _Model(
            embeddings=embeddings.data_ptr(),
            positions=None if positions is None else positions.data_ptr(),
            rotations=ctypes.addressof(self._rotations),
            residuals=None if cache.residuals is None else cache.residuals.data_ptr(),
            shared=cache.shape.shared_layers,
            norm=_norm(form.norm),
            embedding_scale=form.embedding_scale,
        )
        # Held, as the structure points into them.
        self._tensors = (embeddings, positions, cache.residuals, form.norm)
        self._set_layers(layers)
        if not self._changes_rope:
            self._set_angles(torch.arange(context)[None])

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
        self._address = ctypes.addressof(self._structure)

    def forward(self, batch: Batch) -> torch.Tensor | list[int]:
        """Run one step; write its keys and values into the cache.

        A step may begin behind the shared layers, with what an earlier one has left in the cache of what the
        next layer reads; every other step leaves it there.

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
            return self._finished(step.logits)
        logits: torch.Tensor = self._head(step.normed)
        return self._finished(logits.float())

    def _finished(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what the model makes of the head's product, in place; where it is largest stays the same."""
        if self._logits_factor != 1.0:
            logits.mul_(self._logits_factor)
        if self._logits_softcap:
            logits.div_(self._logits_softcap).tanh_().mul_(self._logits_softcap)
        return logits

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
            batch.first_layer,
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
        dtype = torch.empty(0, dtype=torch.float32)
        made = [self._rotary(dtype, positions, *([name] if name else [])) for name in self._ropes]
        self._angles = [(cos[0].contiguous(), sin[0].contiguous()) for cos, sin in made]
        for rotation, (cos, sin) in zip(self._rotations, self._angles, strict=True):
            rotation.cos, rotation.sin, rotation.dim = cos.data_ptr(), sin.data_ptr(), cos.shape[1]


def _chunks(plan: AttentionPlan) -> ctypes.Array[_Chunk]:
    return (_Chunk * len(plan.chunks))(
        *(
            _Chunk(c.row, c.length, c.slot, c.start, None if c.tree is None else c.tree.data_ptr())
            for c in plan.chunks
        )
    )


def describe(
    model: Any, groups: Sequence[LoraGroup], kernels: NativeKernels, dtype: torch.dtype
) -> ModelForm | str:
    """Return what ``FusedModel`` makes one function of, or the reason why it cannot.

    ``groups`` are the model's linear layers, ``dtype`` is what they multiply in.
    """
    if not kernels.supports_layers(dtype):
        return f"this CPU has no native product in {dtype}"
    expected = tuple(map(ctypes.sizeof, (_Layer, _Model, _Step)))
    assert kernels.structure_bytes == expected, "layer.cpp has other structures"
    return read_model(model, groups, dtype, FAMILIES)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what layers that multiply in ``dtype`` keep keys and values in."""
    return _KEPT[dtype]


def _fused(form: LayerForm, num_heads: int, cache: KVCache, ropes: Sequence[str]) -> FusedLayer:
    shape = cache.shape
    k, v = cache.k[form.index], cache.v[form.index]
    projections, kept = zip(*map(_projection, form.groups), strict=True)
    norms = [getattr(form, name) for name in _NORMS]
    heads = num_heads + 2 * shape.num_kv_heads
    assert projections[0].outputs == heads * shape.head_dim, "a cache of another shape"
    structure = _Layer(
        *projections,
        *map(_norm, norms),
        k.data_ptr(),
        v.data_ptr(),
        cache.tables.data_ptr(),
        cache.tables.shape[1],
        projections[0].inputs,
        projections[3].inputs,
        shape.num_kv_heads,
        num_heads // shape.num_kv_heads,
        shape.head_dim,
        form.window,
        -1 if form.rope is None else ropes.index(form.rope),
        form.activation,
        form.is_parallel,
        form.q_norm is not None and form.q_norm.weight.numel() != shape.head_dim,
        form.scale,
        form.softcap,
        form.residual,
    )
    return FusedLayer(structure, form.groups, (norms, k, v, cache.tables, kept))


def _norm(norm: Norm | None) -> _Norm:
    if norm is None:
        return _Norm()
    bias = None if norm.bias is None else norm.bias.data_ptr()
    return _Norm(norm.weight.data_ptr(), bias, norm.eps, norm.is_centred)


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
