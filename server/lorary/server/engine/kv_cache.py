"""Keys and values of running sequences, in blocks, and the table of who reads which.

Ownership of a position: a sequence writes the positions from its ``num_computed`` on, in blocks that it
owns alone; what is before that is read by it, and by others where the block is in the tree
(``blocks``, which decides all of this). A row of ``tables``, a *slot*, names a running sequence's blocks
in order, so that a step's rows say only which slot they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorary.errors import ConfigError
from lorary.server.engine.blocks import BLOCK, blocks_for
from lorary.server.lazy_memory import lazy_zeros
from lorary.server.native import library as native

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of the cache: layers, key/value heads, most positions of a sequence, width of a head.

    Of every position it also keeps what layer ``shared_layers`` reads, ``hidden`` float32 numbers; nothing
    where ``shared_layers`` is 0.
    """

    num_layers: int
    num_kv_heads: int
    context: int
    head_dim: int
    shared_layers: int = 0
    hidden: int = 0

    @classmethod
    def from_config(cls, config: Any, context: int, shared_layers: int = 0) -> KVShape:
        """Read the shape from a transformers config.

        Raises:
            ConfigError: the model keeps something else than keys and values per head, or has no layer
                behind the shared ones.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("kv_lora_rank", "state_size", "ssm_state_size", "conv_kernel"):
            if getattr(text, name, None):
                raise ConfigError(
                    f"{type(config).__name__} has {name}: latent attention and state-space layers "
                    "cannot be served; choose a base with plain key/value attention"
                )
        if shared_layers >= text.num_hidden_layers:
            raise ConfigError(
                f"--shared-layers is {shared_layers} and the base has {text.num_hidden_layers} layers: no adapter "
                "could change any layer behind them. Give the first layer that the adapters change, or 0."
            )
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        hidden = text.hidden_size if shared_layers else 0
        return cls(text.num_hidden_layers, kv_heads, context, head_dim, shared_layers, hidden)

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one block: keys and values of all layers, and what the first unshared layer reads."""
        kv = 2 * self.num_layers * self.num_kv_heads * BLOCK * self.head_dim * dtype.itemsize
        return kv + BLOCK * self.hidden * torch.float32.itemsize


class KVCache:
    """Keys and values ``k``, ``v`` [layers, blocks, kv_heads, BLOCK, head_dim], and the slots.

    Attributes:
        tables: int32 [slots, blocks of the longest sequence] on the host; a slot's entries beyond its
            sequence's blocks are stale but name blocks that exist.
        residuals: float32 [blocks, BLOCK, hidden], what layer ``shape.shared_layers`` reads of every position;
            None where no layers are shared.
        native: the native kernels, where they serve this cache.
        has_triton: whether the Triton kernel attends over it.
        scratch: number of a block that no sequence ever gets, for what rows write that only fill up a
            step; -1 without one.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        num_slots: int,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        has_scratch: bool = False,
        has_triton: bool = False,
    ) -> None:
        self.shape = shape
        self.num_slots = num_slots
        self.num_blocks = num_blocks
        self.scratch = num_blocks if has_scratch else -1
        size = (
            shape.num_layers,
            num_blocks + has_scratch,
            shape.num_kv_heads,
            BLOCK,
            shape.head_dim,
        )
        try:
            # Zeros, and not whatever memory held before, because attention reads positions beyond a
            # row's own with a weight of exactly 0, and 0 times NaN would be NaN.
            self.k = lazy_zeros(size, dtype, device)
            self.v = lazy_zeros(size, dtype, device)
            self.residuals = (
                lazy_zeros((size[1], BLOCK, shape.hidden), torch.float32, device)
                if shape.shared_layers
                else None
            )
        except (RuntimeError, OSError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"no memory for {num_blocks} blocks of keys and values "
                f"({num_blocks * shape.block_bytes(dtype)} bytes); lower --kv-memory, --max-batch or "
                "--max-context"
            ) from error
        self.tables = torch.zeros(num_slots, blocks_for(shape.context), dtype=torch.int32)
        # The same memory: writing a few numbers through torch costs microseconds each.
        self._tables = self.tables.numpy()
        kernels = native.load() if device.type == "cpu" else None
        self.native = (
            kernels
            if isinstance(kernels, native.NativeKernels) and kernels.supports(dtype)
            else None
        )
        self.has_triton = has_triton
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free_slots(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def take_slot(self, blocks: Sequence[int]) -> int:
        """Take a free slot and fill it in; the scheduler never asks for more than ``num_slots``."""
        slot = self._free.pop()
        self._tables[slot, : len(blocks)] = blocks
        return slot

    def set_blocks(self, slot: int, blocks: Sequence[int], first: int) -> None:
        """Write a sequence's blocks from the ``first`` one on into its slot."""
        self._tables[slot, first : len(blocks)] = blocks[first:]

    def release_slot(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self._free, f"slot {slot} released twice"
        self._free.append(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a block to another one, in every layer."""
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]
        if self.residuals is not None:
            self.residuals[target, :length] = self.residuals[source, :length]

    def copy_below(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks as far as the shared layers go: their keys and values, and what the next layer reads.

        A target may be one of the sources: of each layer all are read before any is written.
        """
        assert self.residuals is not None, "no layers are shared"
        read = torch.tensor(sources, device=self.k.device)
        written = torch.tensor(targets, device=self.k.device)
        layers = range(self.shape.shared_layers)
        for tensor in (*(kv[i] for i in layers for kv in (self.k, self.v)), self.residuals):
            tensor.index_copy_(0, written, tensor.index_select(0, read))
