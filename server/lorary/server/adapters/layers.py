"""The base's linear layers, replaced by ones that add each row's adapter.

``install`` walks a transformers model, groups neighbours that read the same input (q/k/v, gate/up),
and puts a ``LoraMember`` in the place of each linear layer. The weights of a group's plain layers
are laid side by side, so that the base needs one product per group: in the native kernel's packed
layout where it serves them (the layers' own copies are then given up), else as one matrix with the
layers' weights as views. Quantized layers keep their own product. The adapters of a whole group are
added in one call.

The step's segments, and the weights that some groups have for it in the place of the base's (``merged``),
are read from context variables: set by the runner for the time of one forward.
"""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from lorary.bases.mapped import MappedFiles
from lorary.errors import ConfigError
from lorary.server.adapters.ops import torch_ops, triton_ops
from lorary.server.adapters.pool import AdapterPool, GroupPool, GroupSpec
from lorary.server.adapters.rounding import Storage, storage_dtype
from lorary.server.adapters.weights import Weights, multiply
from lorary.server.native import library as native
from lorary.server.native.families import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from lorary.server.adapters.segments import Segments
    from lorary.server.native.products import PackedLinear

logger = logging.getLogger(__name__)

NEVER = sys.maxsize

# Names of layers that read the same tensor, in every transformers model that has all of them.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Ops = Literal["auto", "native", "triton", "torch"]
"""What adds the adapters: the CPU kernel, the GPU kernels, or torch operators."""

_current: ContextVar[Segments | None] = ContextVar("lorary_segments", default=None)
_in_place: ContextVar[Mapping[LoraGroup, Weights] | None] = ContextVar(
    "lorary_weights", default=None
)


@contextmanager
def step_segments(segments: Segments | None) -> Iterator[None]:
    """Make ``segments`` those of every forward within the block, on this thread."""
    token = _current.set(segments)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def step_weights(in_place: Mapping[LoraGroup, Weights] | None) -> Iterator[None]:
    """Let these groups multiply by these weights in every forward within the block, on this thread."""
    token = _in_place.set(in_place)
    try:
        yield
    finally:
        _in_place.reset(token)


class RowKernel(Protocol):
    """A kernel over one group's pool, for all of a step's short rows in one call."""

    def add_rows(self, y: torch.Tensor, x: torch.Tensor, segments: Segments) -> None:
        """Add the adapters of ``segments.short_rows`` to ``y`` [T, sum of outs], in place."""
        ...


class LoraGroup:
    """Linear layers that read the same input, and their pool.

    Attributes:
        spec: names and shapes.
        column_bias: float32 [sum of outs], what column scales leave alone of the layers' outputs; None
            where no layer has a bias.
        pool: the group's rows; set by ``attach``.
        bound: the row-wise kernel over these rows, if there is one; set by ``attach``.
    """

    def __init__(
        self,
        spec: GroupSpec,
        layers: Sequence[nn.Module],
        kernels: native.NativeKernels | None = None,
        *,
        int8: bool = False,
        mapped: MappedFiles,
    ) -> None:
        self.spec = spec
        self.layers = tuple(layers)
        loaded = [p.data for layer in self.layers for p in layer.parameters(recurse=False)]
        self.weight, self.bias = _fuse(self.layers, mapped)
        self.packed: PackedLinear | None = None
        weight, bias = self.weight, self.bias
        if kernels is not None and weight is None:
            weight, bias = _turned(self.layers)
        if kernels is not None and weight is not None and kernels.can_pack(weight):
            pack = kernels.pack_int8 if int8 else kernels.pack
            self.packed = pack(weight, bias)
            self.weight = self.bias = None
            for layer in self.layers:
                _give_up(layer)
        self.column_bias = self._column_bias()
        # Packed, laid side by side or of its own already: what was read of the file is not read again.
        mapped.release(loaded)
        self.pool: GroupPool | None = None
        self.bound: RowKernel | None = None
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def _column_bias(self) -> torch.Tensor | None:
        if self.packed is not None:
            return self.packed.bias
        if self.weight is not None:
            return None if self.bias is None else self.bias.float()
        own = [getattr(layer, "bias", None) for layer in self.layers]
        there = next((bias for bias in own if bias is not None), None)
        if there is None:
            return None
        parts = [
            there.new_zeros(out) if bias is None else bias.detach()
            for bias, out in zip(own, self.spec.out_features, strict=True)
        ]
        return torch.cat(parts).float()

    def attach(self, pool: GroupPool, bound: RowKernel | None) -> None:
        """Give the group its rows, and the row-wise kernel over them if there is one."""
        self.pool, self.bound = pool, bound

    def output(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Return one member's output for ``x`` [..., in], adapters included.

        The first member called with an input computes all; the others find their part. The last
        member lets go of the tensors.
        """
        if self._input is not x:
            self._input, self._outputs = x, self._compute(x)
        result = self._outputs[member]
        if member == len(self.layers) - 1:
            self._input, self._outputs = None, ()
        return result

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        in_place = _in_place.get()
        y = multiply(self if in_place is None else in_place.get(self, self), x)
        segments = _current.get()
        if segments is not None:
            self._add_adapters(y, x, segments)
        if len(self.layers) == 1:
            return (y,)
        return torch.split(y, list(self.spec.out_features), dim=-1)

    def _add_adapters(self, y: torch.Tensor, x: torch.Tensor, segments: Segments) -> None:
        assert self.pool is not None, "a step with adapters before attach()"
        x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if x_rows.dtype != self.pool.dtype:
            x_rows = x_rows.to(self.pool.dtype)
        pool = self.pool
        for segment in segments.long:
            torch_ops.add_segment(
                y_rows,
                x_rows,
                pool.a,
                pool.b,
                segment,
                pool.row_scales,
                pool.columns,
                self.column_bias,
            )
        if segments.num_short:
            assert self.bound is not None, "short rows without a row-wise kernel"
            self.bound.add_rows(y_rows, x_rows.contiguous(), segments)


class LoraMember(nn.Module):
    """Stands where a linear layer stood, as one member of its group."""

    def __init__(self, group: LoraGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member
        self.layer = group.layers[member]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output plus each row's adapter; x [..., in] → [..., out]."""
        return self.group.output(self.member, x)


class PackedHead(nn.Module):
    """Stands where the output head stood: its product in the native kernel, in float32.

    ``weight`` stays the base's own where it is the input embedding, too; else it is given up.
    """

    def __init__(self, head: nn.Linear, kernels: native.NativeKernels, *, is_tied: bool) -> None:
        super().__init__()
        self.weight = head.weight
        self.packed = kernels.pack(head.weight.data, head.bias)
        if not is_tied:
            _give_up(head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 logits; x [..., hidden] → [..., vocab]."""
        return self.packed.linear(x.float())


class LoraModel:
    """A model whose linear layers take adapters, and the pool behind them.

    Args:
        model: a transformers model.
        memory_bytes: for adapters.
        dtype: of adapters and of what layers hand on.
        int8: round the linear layers' weights to 8 bits, natively: all, or those of these names.
        storage: what adapters are kept in; "auto" is ``dtype``.
        ops: what adds the adapters; "auto" takes the device's kernels, and torch operators where it
            has none.
        progress: told how many groups of how many are packed.

    Raises:
        ConfigError: ``int8``, ``storage`` or ``ops`` without the kernels for it; ``int8`` for a layer
            that they cannot round, or for a part of the layers that read one input.

    Attributes:
        model: the transformers model, changed in place.
        groups: every group, in the model's order.
        pool: where adapters lie.
        kernels: the native kernels, if this device has them.
        long_from: an adapter with at least this many rows in a step is multiplied on its own, by
            torch operators.
        has_triton: whether the Triton kernels add adapters, all rows of a step in one call a group.
    """

    def __init__(
        self,
        model: Any,
        *,
        memory_bytes: int,
        dtype: torch.dtype,
        int8: bool | Collection[str] = False,
        storage: Storage = "auto",
        ops: Ops = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        device = next(model.parameters()).device
        kernel = native.load() if device.type == "cpu" else None
        if isinstance(kernel, str):
            logger.warning("serving on torch operators, several times slower: %s", kernel)
            kernel = None
        self.kernels = kernel
        if int8 and (kernel is None or not kernel.has_int8):
            raise ConfigError("8-bit weights need the native kernels and a CPU with AVX512-VNNI")
        self.groups = install(model, kernel, int8=int8, progress=progress)
        if int8:
            left = [
                g.spec.modules[0]
                for g in self.groups
                if g.packed is None and _is_int8(g.spec.modules, int8)
            ]
            if left:
                raise ConfigError(
                    f"'{left[0]}' cannot be rounded to 8 bits: it is no plain linear layer in float32 "
                    "or bfloat16; use --quantize none"
                )
        self.pool = AdapterPool(
            [g.spec for g in self.groups],
            memory_bytes=memory_bytes,
            dtype=dtype,
            device=device,
            storage=storage_dtype(storage, dtype),
            kernels=kernel,
        )
        row_kernels = self._row_kernels(ops, dtype, device)
        # torch's bfloat16 products with a rank's few columns cost 0.1 ms whatever their size, and
        # compile anew for every number of rows: the kernels take prompts, too (docs/log.md).
        self.long_from = 1 if row_kernels is None else NEVER
        self.has_triton = isinstance(row_kernels, triton_ops.TritonKernels)
        for group, pool in zip(self.groups, self.pool.groups, strict=True):
            bound = None
            if row_kernels is not None:
                bound = row_kernels.bind(pool.a, pool.b, pool.row_scales, dtype, group.column_bias)
            if isinstance(bound, triton_ops.TritonPool):
                bound.warm_up()
            group.attach(pool, bound)

    def _row_kernels(
        self, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> native.NativeKernels | triton_ops.TritonKernels | None:
        """Return what adds the adapters of rows; None for torch operators."""
        is_auto = ops == "auto"
        if ops == "torch" or (is_auto and device.type == "cpu" and self.kernels is None):
            return None
        found: native.NativeKernels | triton_ops.TritonKernels | str
        if ops == "native" or (is_auto and device.type == "cpu"):
            found = self.kernels or "the native kernels are not there"
        elif ops == "triton" or device.type == "cuda":
            found = triton_ops.load()
        else:
            found = f"there are none for '{device.type}'"
        if not isinstance(found, str) and not found.supports(dtype):
            found = f"there is none for {dtype}"
        if not isinstance(found, str):
            kept = self.pool.storage
            if not found.supports_storage(kept):
                name = str(kept).removeprefix("torch.")
                raise ConfigError(
                    f"this {device.type} cannot multiply adapters that are kept in {name}; fp8 needs an "
                    "NVIDIA GPU of compute capability 8.9 or newer. Use --adapter-dtype int8."
                )
            return found
        if not is_auto:
            raise ConfigError(f"adapters cannot be added by {ops} kernels: {found}")
        logger.warning("adding adapters with torch operators, several times slower: %s", found)
        return None


def install(
    model: Any,
    kernels: native.NativeKernels | None = None,
    *,
    int8: bool | Collection[str] = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[LoraGroup]:
    """Replace every linear layer, in place, and return the groups: all of them but the head.

    With ``kernels`` the weights that they can pack are packed, the head's, too; with ``int8`` rounded
    to 8 bits, all but the head's. Group by group, and each gives up its weights at once: the peak of
    memory is what remains at the end and one group.

    Raises:
        ConfigError: the model has no linear layers that adapters could change, or ``int8`` names a
            part of the layers that read one input.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layer_of = _layer_numbers(model)
    found: list[tuple[nn.Module, tuple[str, ...], list[nn.Module], GroupSpec]] = []
    for parent_name, parent in list(model.named_modules()):
        linears = {
            name: child
            for name, child in parent.named_children()
            if _shape(child) is not None and child is not head
        }
        for names in _grouped(linears):
            layers = [linears[name] for name in names]
            shapes = [_shape(layer) for layer in layers]
            spec = GroupSpec(
                modules=tuple(f"{parent_name}.{name}" if parent_name else name for name in names),
                in_features=next(s[1] for s in shapes if s),
                out_features=tuple(s[0] for s in shapes if s),
                layer=layer_of.get(id(parent), 0),
            )
            found.append((parent, names, layers, spec))
    groups: list[LoraGroup] = []
    mapped = MappedFiles()
    for parent, names, layers, spec in found:
        group = LoraGroup(spec, layers, kernels, int8=_is_int8(spec.modules, int8), mapped=mapped)
        for member, name in enumerate(names):
            setattr(parent, name, LoraMember(group, member))
        groups.append(group)
        if progress is not None:
            progress(len(groups), len(found))
    if not groups:
        raise ConfigError(f"{type(model).__name__} has no linear layers for adapters to change")
    if kernels is not None and type(head) is nn.Linear and kernels.can_pack(head.weight):
        is_tied = head.weight is model.get_input_embeddings().weight
        model.set_output_embeddings(PackedHead(head, kernels, is_tied=is_tied))
    mapped.own(model)
    return groups


def _layer_numbers(model: Any) -> dict[int, int]:
    """Return by ``id`` of a module which decoder layer it is in; nothing of modules outside of them."""
    layers = decoder_layers(model)
    return {id(module): i for i, layer in enumerate(layers) for module in layer.modules()}


def check_int8(names: Collection[str], int8: Collection[str]) -> None:
    """Check that layers which read one input, of a model with these linear layers, agree on 8 bits.

    Raises:
        ConfigError: some are in ``int8``, and their neighbours are not.
    """
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        for fused in _FUSED:
            group = tuple(f"{parent}.{name}" if parent else name for name in fused)
            if all(name in names for name in group):
                _is_int8(group, int8)


def _is_int8(group: Sequence[str], int8: bool | Collection[str]) -> bool:
    """Whether the layers of this group are to be rounded."""
    if isinstance(int8, bool):
        return int8
    chosen = [name for name in group if name in int8]
    if chosen and len(chosen) < len(group):
        others = ", ".join(f"'{name}'" for name in group if name not in int8)
        raise ConfigError(
            f"'{chosen[0]}' is to be in int8, and {others} not; they read the same input and are one "
            "product, so they must be kept alike. Give them one format in the quantization plan."
        )
    return bool(chosen)


def _grouped(linears: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    rest = dict.fromkeys(linears)
    result: list[tuple[str, ...]] = []
    for names in _FUSED:
        widths = {_shape(linears[n])[1] for n in names if n in rest}  # type: ignore[index]
        if all(n in rest for n in names) and len(widths) == 1:
            result.append(names)
            for n in names:
                del rest[n]
    return result + [(n,) for n in rest]


def _shape(layer: Any) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer, plain, quantized, or GPT-2's transposed one."""
    if isinstance(layer, nn.Linear):  # bitsandbytes' layers are subclasses
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return int(layer.nf), int(layer.weight.shape[0])
    return None


def _give_up(layer: nn.Module) -> None:
    """Free a layer's own weight and bias: the packed copy stands for them."""
    for parameter in layer.parameters(recurse=False):
        parameter.data = parameter.data.new_empty(0)


def _turned(
    layers: Sequence[nn.Module],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Copy the weight of one of GPT-2's layers, kept as [in, out], to [out, in]."""
    if [type(layer).__name__ for layer in layers] != ["Conv1D"]:
        return None, None
    layer: Any = layers[0]
    return layer.weight.data.t().contiguous(), layer.bias.data


def _fuse(
    layers: Sequence[nn.Module], mapped: MappedFiles
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Lay plain layers' weights side by side; each layer's weight becomes a view of its part."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return None, None
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len({(lin.weight.dtype, lin.bias is None) for lin in linears}) != 1:
        return None, None
    if len(linears) == 1:
        mapped.own(linears[0])
        return linears[0].weight.data, None if linears[0].bias is None else linears[0].bias.data
    weight = torch.cat([lin.weight.data for lin in linears])
    bias = None if linears[0].bias is None else torch.cat([lin.bias.data for lin in linears])
    start = 0
    for lin in linears:
        stop = start + lin.out_features
        lin.weight.data = weight[start:stop]
        if bias is not None:
            lin.bias.data = bias[start:stop]
        start = stop
    return weight, bias
