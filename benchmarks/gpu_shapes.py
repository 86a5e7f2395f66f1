"""Sizes of the bases that ``gpu`` measures, and the bytes that a decode step of them has to move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama: what its configuration needs, and the least that its parts may be run at."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def groups(self) -> Mapping[str, tuple[int, tuple[int, ...]]]:
        """Of each group of linear layers that read one input: the input's width and the outputs'."""
        kv = self.kv_heads * self.head_dim
        return {
            "q/k/v": (self.hidden, (self.hidden, kv, kv)),
            "o": (self.hidden, (self.hidden,)),
            "gate/up": (self.hidden, (self.intermediate, self.intermediate)),
            "down": (self.intermediate, (self.hidden,)),
        }

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Every linear layer but the head, by its name in the model: outputs and inputs."""
        names = {
            "q/k/v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": ("self_attn.o_proj",),
            "gate/up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }
        return {
            f"model.layers.{layer}.{name}": (out, width)
            for layer in range(self.layers)
            for group, (width, outs) in self.groups.items()
            for name, out in zip(names[group], outs, strict=True)
        }

    @property
    def adapter_row(self) -> int:
        """Numbers of one rank row of an adapter on every linear layer."""
        return sum(out + width for out, width in self.modules.values())

    def kv_bytes(self, positions: float, itemsize: int) -> float:
        """Return the bytes of keys and values of so many positions, all layers together."""
        return 2 * positions * self.layers * self.kv_heads * self.head_dim * itemsize


SHAPES: Mapping[str, Shape] = {
    "llama-3-8b": Shape(
        hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256
    ),
    # For tests: everything is there, and nothing is slow.
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=320),
}
