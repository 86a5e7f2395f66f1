"""Keys and values of running sequences: one slot per sequence.

A slot is one page as long as the context: on the CPU the system gives memory to the parts that are
written only, so a long context costs nothing until it is used, and a batch of neighbouring slots is
a view for batched products. The engine keeps occupied slots at the front where such products are
used; the native kernels read any slots alike.

Ownership of a slot's positions::

    [0, num_computed)   written, read by attention; owned by the sequence until release
    [num_computed, C)   not written in this life; may hold an earlier sequence's values, never read

What a released slot holds stays readable until the slot is taken again (``prefix_cache``).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch

from lorary.errors import ConfigError
from lorary.server.native import library as native


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of the cache: layers, key/value heads, positions per slot, width of a head."""

    num_layers: int
    num_kv_heads: int
    context: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any, context: int) -> KVShape:
        """Read the shape from a transformers config.

        Raises:
            ConfigError: the model keeps something else than keys and values per head.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("kv_lora_rank", "state_size", "ssm_state_size", "conv_kernel"):
            if getattr(text, name, None):
                raise ConfigError(
                    f"{type(config).__name__} has {name}: latent attention and state-space layers "
                    "cannot be served; choose a base with plain key/value attention"
                )
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(text.num_hidden_layers, kv_heads, context, head_dim)


class KVCache:
    """``k`` and ``v`` [layers, slots, kv_heads, context, head_dim], and who has which slot."""

    def __init__(
        self, shape: KVShape, *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.num_slots = num_slots
        size = (shape.num_layers, num_slots, shape.num_kv_heads, shape.context, shape.head_dim)
        try:
            self.k = _lazy_zeros(size, dtype, device)
            self.v = _lazy_zeros(size, dtype, device)
        except (RuntimeError, OSError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"no memory for {num_slots} sequences of {shape.context} tokens "
                f"({self.bytes_for(shape, num_slots, dtype)} bytes); lower --max-batch or "
                "--max-context"
            ) from error
        kernels = native.load() if device.type == "cpu" else None
        self.native = (
            kernels
            if isinstance(kernels, native.NativeKernels) and kernels.supports(dtype)
            else None
        )
        """The native kernels, where they serve this cache."""
        self._free = list(range(num_slots - 1, -1, -1))

    @staticmethod
    def bytes_for(shape: KVShape, num_slots: int, dtype: torch.dtype) -> int:
        """Bytes of a cache of this shape."""
        element = torch.empty((), dtype=dtype).element_size()
        row = shape.num_kv_heads * shape.head_dim * element
        return 2 * shape.num_layers * num_slots * shape.context * row

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def free_slots(self) -> tuple[int, ...]:
        """Slots that nobody has, in no order."""
        return tuple(self._free)

    def allocate(self) -> int:
        """Take the lowest free slot; the scheduler never asks when ``num_free`` is 0."""
        self._free.sort(reverse=True)
        return self._free.pop()

    def take(self, slot: int) -> int:
        """Take this very slot, which must be free."""
        self._free.remove(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self._free, f"slot {slot} released twice"
        self._free.append(slot)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot to another one, in every layer."""
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]


def _lazy_zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros that cost memory on the CPU only where they are written.

    Zeros, and not whatever memory held before, because attention reads positions beyond a row's
    own with a weight of exactly 0, and 0 times NaN would be NaN.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    count = math.prod(size)
    buffer = mmap.mmap(-1, count * torch.empty((), dtype=dtype).element_size())
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(size)
