"""Attention over the paged cache, behind transformers' ``AttentionInterface``.

The model runs on a flat row of tokens [1, T]: first the decode rows (one token each), then the prefill
chunks. Decode rows attend all at once; every chunk attends on its own. The step's plan is read from a
context variable that the runner sets for one forward.

This serves the layers that do not run as one native call (``native/decoder.py``): quantized bases,
other families, other devices. Decode attention has three implementations here: the native kernel on
CPUs and the Triton kernel on NVIDIA GPUs, which read the blocks where they are, and two batched products
over a gathered copy elsewhere.
SDPA is used for prefill only: on the CPU its tiles are made for long queries (half the speed of the
products for one token).
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lorary.server.engine.blocks import BLOCK, blocks_for
from lorary.server.engine.paged_decode import paged_decode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorary.server.engine.kv_cache import KVCache

NAME = "lorary"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill tokens of one sequence within the flat row.

    Attributes:
        row: first row of the chunk.
        length: tokens in it.
        slot: the sequence's row of the cache's table.
        start: position of its first token, = tokens already in the cache.
        tree: bool [length, start + length] of what may see what, when the chunk ends in branches
            (labels to be scored side by side); None for plain causal attention.
    """

    row: int
    length: int
    slot: int
    start: int
    tree: torch.Tensor | None = None


class AttentionPlan:
    """What attention needs to know of a step; read by every layer.

    What only the torch operators need is worked out when first asked for.

    Attributes:
        cache: keys and values.
        slots: int32 [T] on the host, every row's slot; decode rows come first.
        positions: int32 [T] on the host, where in its sequence a row's key goes.
        num_decode: how many rows at the front are decode rows.
        lengths: int32 [num_decode] on the host, positions each decode row reads.
        chunks: the prefill chunks.
    """

    def __init__(
        self,
        cache: KVCache,
        slots: torch.Tensor,
        positions: torch.Tensor,
        num_decode: int,
        chunks: Sequence[Chunk],
        lengths: torch.Tensor | None = None,
    ) -> None:
        self.cache = cache
        self.slots = slots
        self.positions = positions
        self.num_decode = num_decode
        self.lengths = positions[:num_decode] + 1 if lengths is None else lengths
        self.chunks = tuple(chunks)
        self._masks: dict[int | None, torch.Tensor] = {}
        self._chunk_blocks: dict[int, torch.Tensor] = {}

    def arrays(self) -> list[torch.Tensor]:
        """Return, on the host, all that attention reads on the device but masks; for ``place``."""
        decode = [self._host_table(), self.lengths] if self.num_decode else []
        chunks = [self._host_blocks(chunk) for chunk in self.chunks]
        return [self._host_index(), *decode, *chunks]

    def place(self, there: Sequence[torch.Tensor]) -> None:
        """Take what ``arrays`` returned as it is on the device, so that nothing of it is copied again."""
        rest = iter(there)
        self.write_index = next(rest)
        if self.num_decode:
            self.decode_table, self.decode_lengths = next(rest), next(rest)
        for chunk in self.chunks:
            self._chunk_blocks[chunk.row] = next(rest)

    def _host_index(self) -> torch.Tensor:
        positions = self.positions.long()
        block = self.cache.tables[self.slots.long(), positions // BLOCK].long()
        return cache_rows(block, positions, torch.arange(self.cache.shape.num_kv_heads))

    def _host_table(self) -> torch.Tensor:
        rows = self.slots[: self.num_decode].long()
        return self.cache.tables[rows, : blocks_for(self.longest)]

    def _host_blocks(self, chunk: Chunk) -> torch.Tensor:
        count = blocks_for(chunk.start + chunk.length)
        return self.cache.tables[chunk.slot, :count].long()

    @cached_property
    def write_index(self) -> torch.Tensor:
        """Return int64 [T * kv_heads]: row of the flattened cache for every (token, head)."""
        return self._host_index().to(self.cache.k.device)

    @cached_property
    def decode_table(self) -> torch.Tensor:
        """Return int32 [num_decode, W]: the blocks of the decode rows, as many as the longest has."""
        return self._host_table().to(self.cache.k.device)

    @cached_property
    def decode_blocks(self) -> torch.Tensor:
        """Return ``decode_table`` as int64."""
        return self.decode_table.long()

    @cached_property
    def decode_lengths(self) -> torch.Tensor:
        """Return ``lengths`` on the cache's device."""
        return self.lengths.to(self.cache.k.device)

    def chunk_blocks(self, chunk: Chunk) -> torch.Tensor:
        """Return int64 [W]: the blocks that hold what a chunk sees."""
        blocks = self._chunk_blocks.get(chunk.row)
        if blocks is None:
            blocks = self._host_blocks(chunk).to(self.cache.k.device)
            self._chunk_blocks[chunk.row] = blocks
        return blocks

    @cached_property
    def longest(self) -> int:
        """Return the largest of ``lengths``."""
        return int(self.lengths.max())

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return 0 where a decode row may look and -inf elsewhere: [num_decode, 1, 1, W * BLOCK]."""
        mask = self._masks.get(window)
        if mask is None:
            device = self.cache.k.device
            lengths = self.decode_lengths
            position = torch.arange(self.decode_blocks.shape[1] * BLOCK, device=device)
            hidden = position >= lengths[:, None]
            if window is not None:
                hidden |= position < lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]
            self._masks[window] = mask
        return mask


def cache_rows(block: torch.Tensor, positions: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Return int64 [T * kv_heads]: rows of the flattened cache of every (token, head).

    Shapes: block int64 [T], the one that holds each token's position; positions int64 [T]; heads [kv_heads],
    the numbers from 0 on.
    """
    row = block[:, None] * len(heads) + heads
    return (row * BLOCK + (positions % BLOCK)[:, None]).view(-1)


_current: ContextVar[AttentionPlan | None] = ContextVar("lorary_attention", default=None)


@contextmanager
def step_plan(plan: AttentionPlan) -> Iterator[None]:
    """Make ``plan`` that of every forward within the block, on this thread."""
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values, and attend: transformers' attention signature.

    Shapes: query [1, H, T, D], key and value [1, Hkv, T, D] → [1, T, H, D].

    Raises:
        NotImplementedError: the model asks for attention sinks, which this path does not have; the
            runner's first forward at start-up turns it into a ``ConfigError``.
    """
    plan = _current.get()
    assert plan is not None, "attention outside of a step"
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    heads, tokens, dim = query.shape[1:]
    scale = scaling if scaling is not None else dim**-0.5
    k_layer, v_layer = plan.cache.k[layer], plan.cache.v[layer]
    k_layer.view(-1, dim).index_copy_(
        0, plan.write_index, key[0].transpose(0, 1).reshape(-1, dim).to(k_layer.dtype)
    )
    v_layer.view(-1, dim).index_copy_(
        0, plan.write_index, value[0].transpose(0, 1).reshape(-1, dim).to(v_layer.dtype)
    )
    rows = query[0].transpose(0, 1)  # [T, H, D]
    parts: list[torch.Tensor] = []
    if plan.num_decode:
        decode = rows[: plan.num_decode]
        if plan.cache.native is not None:
            out = plan.cache.native.decode_attention(
                decode,
                k_layer,
                v_layer,
                plan.cache.tables,
                plan.slots,
                plan.lengths,
                scale=scale,
                softcap=softcap,
                window=sliding_window,
            )
        elif plan.cache.has_triton:
            out = paged_decode(
                decode,
                k_layer,
                v_layer,
                plan.decode_table,
                plan.decode_lengths,
                scale,
                sliding_window,
                softcap,
            )
        else:
            out = _decode(plan, decode, k_layer, v_layer, scale, sliding_window, softcap)
        parts.append(out)
    for chunk in plan.chunks:
        q = query[:, :, chunk.row : chunk.row + chunk.length]
        blocks = plan.chunk_blocks(chunk)
        parts.append(_prefill(chunk, blocks, q, k_layer, v_layer, scale, sliding_window, softcap))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(1, tokens, heads, dim), None


def _decode(
    plan: AttentionPlan,
    q: torch.Tensor,
    k_layer: torch.Tensor,
    v_layer: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend one token per row; q [n, H, D] → [n, H, D]."""
    rows, heads, dim = q.shape
    k, v = _gather(k_layer, plan.decode_blocks), _gather(v_layer, plan.decode_blocks)
    q = q.reshape(rows, k.shape[1], heads // k.shape[1], dim)
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores += plan.decode_mask(window, scores.dtype)
    return torch.matmul(torch.softmax(scores, dim=-1), v).view(rows, heads, dim)


def _gather(layer: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Copy blocks int64 [n, W] of [blocks, Hkv, BLOCK, D] into [n, Hkv, W * BLOCK, D]."""
    return layer[blocks].transpose(1, 2).flatten(2, 3)


def _prefill(
    chunk: Chunk,
    blocks: torch.Tensor,
    q: torch.Tensor,
    k_layer: torch.Tensor,
    v_layer: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend one sequence's chunk; q [1, H, t, D] → [t, H, D]."""
    total = chunk.start + chunk.length
    k = _gather(k_layer, blocks[None])[:, :, :total]
    v = _gather(v_layer, blocks[None])[:, :, :total]
    is_plain = chunk.tree is None and chunk.start == 0 and (window is None or window >= total)
    mask = None if is_plain else _chunk_mask(chunk, window, q.device)
    if softcap is None:
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_plain, scale=scale, enable_gqa=True
        )
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * scale / softcap) * softcap
        if mask is None:
            mask = _chunk_mask(chunk, window, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.matmul(torch.softmax(scores, dim=-1), v)
    return out[0].transpose(0, 1)


def _chunk_mask(chunk: Chunk, window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool [length, start + length]: whether a token of the chunk sees a position."""
    if chunk.tree is not None:
        return chunk.tree
    position = torch.arange(chunk.start + chunk.length, device=device)
    row = torch.arange(chunk.start, chunk.start + chunk.length, device=device)[:, None]
    mask = position <= row
    if window is not None:
        mask &= position > row - window
    return mask


AttentionInterface.register(NAME, attend)
