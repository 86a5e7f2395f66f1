"""Attention for training on a CPU: keys are not repeated for their group of queries.

torch's fused kernel is slow backward in bfloat16 on a CPU (30 ms a layer forward and backward, where
this takes 5; docs/log.md), and transformers' eager attention copies keys and values for each query
head and takes the softmax in float32 copies. Here the queries that share a key head form one product with it.

Semantics: ``out[h] = softmax(s q[h] k[h // g]ᵀ + mask) v[h // g]`` with g query heads per key head. Of a packed row, whose
positions begin anew with each sample, only the blocks on the diagonal are computed: the mask allows no others.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lorary.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

NAME = "lorary_grouped"
# What some models hand over and this does not compute; a model that has one trains with eager.
_FOREIGN = ("softcap", "s_aux", "position_bias")
_FOREIGN_CONFIG = ("attn_logit_softcapping", "attention_dropout")


_Bounds = list[list[tuple[int, int]]]
_KNOWN: ContextVar[_Bounds | None] = ContextVar("known sample bounds", default=None)


@contextmanager
def known_bounds(bounds: _Bounds | None) -> Iterator[None]:
    """Within the context every row's samples are these: for tensors that have shapes and no values."""
    token = _KNOWN.set(bounds)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def register() -> None:
    """Make ``attn_implementation="lorary_grouped"`` known; idempotent."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def suits(config: Any) -> bool:
    """Whether a model of this configuration asks for nothing that this attention lacks."""
    is_plain = not any(getattr(config, name, None) for name in _FOREIGN_CONFIG)
    return is_plain and config.model_type in ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def attention_of(config: Any, device: str) -> str:
    """Return the attention that a causal language model of this configuration trains with on a device."""
    if device.startswith("cuda"):
        return "sdpa"
    if device == "cpu" and suits(config):
        register()
        return NAME
    return "eager"


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend; the signature is that of transformers' attention functions.

    Args:
        module: the attention layer; unused.
        query: [B, H, T, D].
        key: [B, H / g, S, D].
        value: [B, H / g, S, D].
        attention_mask: added to the scores, [B or 1, 1, T, S or more].
        scaling: of the scores; default D ** -0.5.
        dropout: must be 0.
        kwargs: whatever else the model hands over: position ids [B, T] are read; what would change the
            result is refused.

    Returns:
        [B, T, H, D], and None for the weights.
    """
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign or dropout:
        raise ConfigError(f"{NAME} attention cannot do {foreign or 'dropout'}; use eager.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bounds = _sample_bounds(kwargs.get("position_ids"), query.shape[0], key.shape[2])
    if bounds is None or attention_mask is None or query.shape[2] != key.shape[2]:
        return _attend(query, key, value, attention_mask, scale), None
    rows = []
    for i, samples in enumerate(bounds):
        mask = attention_mask[i if len(attention_mask) > 1 else 0]
        parts = [
            _attend(
                query[i : i + 1, :, a:b],
                key[i : i + 1, :, a:b],
                value[i : i + 1, :, a:b],
                mask[None, :, a:b, a:b],
                scale,
            )
            for a, b in samples
        ]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float
) -> Tensor:
    """Return [B, T, H, D]."""
    batch, heads, length, width = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    queries = (query * scale).reshape(batch * key_heads, -1, width)
    scores = torch.bmm(queries, key.reshape(-1, keys, width).transpose(1, 2))
    scores = scores.view(batch, key_heads, -1, length, keys)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :keys]
    weights = torch.softmax(scores, dim=-1).view(batch * key_heads, -1, keys)
    out = torch.bmm(weights, value.reshape(-1, keys, width))
    return out.view(batch, heads, length, width).transpose(1, 2).contiguous()


def _sample_bounds(position_ids: Tensor | None, batch: int, length: int) -> _Bounds | None:
    """Return for each row where its samples begin and end; None where no row holds several."""
    if (known := _KNOWN.get()) is not None:
        return known
    if position_ids is None or position_ids.shape != (batch, length):
        return None
    is_start = position_ids == 0
    if int(is_start[:, 1:].sum()) == 0:
        return None
    starts = [[0, *(row[1:].nonzero()[:, 0] + 1).tolist(), length] for row in is_start]
    return [list(pairwise(row)) for row in starts]
