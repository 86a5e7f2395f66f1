"""What a step has to read and to multiply, and the least time for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_BF16 = 2
# An 8-bit weight's scale and offset, 4 bytes each, for 64 of them.
_INT8 = 1 + 8 / 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a base: what ``work`` needs of it."""

    layer_weights: int
    head_weights: int
    adapter_row_weights: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one step: bytes read once, and operations (a product and a sum are two) by dtype."""

    bytes_read: float
    bf16_operations: float
    int8_operations: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured: bytes and operations a second."""

    bandwidth: float
    bf16_peak: float
    int8_peak: float


def shape_of(config: object, modules: Mapping[str, tuple[int, int]]) -> Shape:
    """Read the sizes from a transformers config and the linear layers' (out, in)."""
    from lorary.server.engine.kv_cache import KVShape

    kv = KVShape.from_config(config, 1)
    return Shape(
        layer_weights=sum(out * width for out, width in modules.values()),
        head_weights=config.vocab_size * config.hidden_size,  # type: ignore[attr-defined]
        adapter_row_weights=sum(out + width for out, width in modules.values()),
        num_layers=kv.num_layers,
        num_heads=config.num_attention_heads,  # type: ignore[attr-defined]
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
    )


def work(
    shape: Shape,
    *,
    rows: int,
    logits_rows: int,
    context: float,
    adapters: int,
    rank: int,
    read_context: float | None = None,
    int8: bool = False,
) -> Work:
    """Return what a step of ``rows`` tokens has to do.

    Args:
        shape: the base's sizes.
        rows: tokens in the step.
        logits_rows: of them, those whose next token is wanted.
        context: keys that a row attends to, on average.
        adapters: distinct ones in the step; with any, every row has one.
        rank: of each.
        read_context: positions of keys and values read from memory, all rows together; a decode
            step's are ``rows * context``, the default.
        int8: weights of the layers have 8 bits, and are multiplied as such.
    """
    kv_position = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    positions = rows * context if read_context is None else read_context
    layers = 2 * rows * shape.layer_weights
    rest: float = 2 * logits_rows * shape.head_weights
    rest += 4 * rows * context * shape.num_layers * shape.num_heads * shape.head_dim
    if adapters:
        rest += 2 * rows * rank * shape.adapter_row_weights
    return Work(
        bytes_read=shape.layer_weights * (_INT8 if int8 else _BF16)
        + shape.head_weights * _BF16
        + adapters * rank * shape.adapter_row_weights * _BF16
        + positions * kv_position * _BF16,
        bf16_operations=rest + (0 if int8 else layers),
        int8_operations=layers if int8 else 0,
    )


def memory_s(work: Work, machine: Machine) -> float:
    """Return the seconds to read the step's bytes once."""
    return work.bytes_read / machine.bandwidth


def compute_s(work: Work, machine: Machine) -> float:
    """Return the seconds to do the step's operations at the peak of their dtype."""
    return work.bf16_operations / machine.bf16_peak + work.int8_operations / machine.int8_peak


def bound_s(work: Work, machine: Machine) -> float:
    """Return the least seconds of the step."""
    return max(memory_s(work, machine), compute_s(work, machine))
