"""How many blocks the cache gets: what is asked for, or what fits into the memory that is left."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from lorary.bases.free_memory import free_bytes
from lorary.errors import ConfigError
from lorary.server.engine.blocks import BLOCK, blocks_for

if TYPE_CHECKING:
    from lorary.server.engine.kv_cache import KVShape

logger = logging.getLogger(__name__)

SHORT_BYTES = 256 << 20
"""Memory is short where the system has less than this to give."""


def plan_blocks(
    shape: KVShape,
    dtype: torch.dtype,
    *,
    max_batch: int,
    kv_memory_bytes: int,
    memory_fraction: float,
    available_bytes: int,
) -> int:
    """Return the number of blocks of the cache.

    Args:
        shape: of the cache.
        dtype: of keys and values.
        max_batch: sequences in one step.
        kv_memory_bytes: what was asked for; 0 takes what ``max_batch`` sequences of the longest kind
            need, but no more than ``memory_fraction`` of what is there.
        memory_fraction: share of ``available_bytes``.
        available_bytes: what base, adapters and a step's own tensors leave.

    Raises:
        ConfigError: not one sequence of the longest kind would fit, so that it could never end.
    """
    block_bytes = shape.block_bytes(dtype)
    longest = blocks_for(shape.context)
    allowed = int(available_bytes * memory_fraction)
    if kv_memory_bytes:
        num_blocks, what = kv_memory_bytes // block_bytes, f"--kv-memory of {kv_memory_bytes} bytes"
    else:
        num_blocks = min(max_batch * longest, allowed // block_bytes)
        what = f"--memory-fraction {memory_fraction:g} of the {available_bytes} bytes that are free"
    if num_blocks < longest:
        raise ConfigError(
            f"{what} holds keys and values of {num_blocks * BLOCK} tokens, and a single answer may "
            f"have {shape.context}: that takes {longest * block_bytes} bytes. Lower --max-context, or "
            "give it more memory."
        )
    if num_blocks < max_batch * longest:
        logger.info(
            "keys and values: %d tokens in all, shared by up to %d answers of up to %d",
            num_blocks * BLOCK,
            max_batch,
            shape.context,
        )
    return num_blocks


def available_bytes(device: torch.device, *, promised: int = 0) -> int:
    """Return the bytes that this process could still take on a device.

    Args:
        device: where.
        promised: bytes that will be taken beside: by a step's tensors; on the CPU by what is reserved
            but not yet written, too, which the system does not count.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = free_bytes()
    return max(0, free - promised)


def is_short(device: torch.device) -> bool:
    """Whether what could be given up should be, for the system has hardly any memory left.

    On a GPU the allocator keeps what it was given, so that only a step that runs out of memory can tell.
    """
    return device.type == "cpu" and available_bytes(device) < SHORT_BYTES
