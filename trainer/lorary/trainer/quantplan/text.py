"""Text to measure with: token blocks of one length, and two parts that share no text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorary.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Token ids, int64 [N, length]: what sensitivities come from, and what perplexity is measured on."""

    calibration: Tensor
    held_out: Tensor


def make_blocks(texts: Iterable[str], tokenizer: Any, *, count: int, length: int) -> Blocks:
    """Tokenize texts, end tokens between them, and cut ``count`` blocks for each of the two parts.

    Which part a text is in is a bit of its hash, so that no text is in both.

    Raises:
        InvalidRequest: there is not enough text.
    """
    parts: list[list[int]] = [[], []]
    wanted = count * length
    for text in texts:
        part = parts[hashlib.sha256(text.encode()).digest()[0] & 1]
        if len(part) < wanted:
            part += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if all(len(ids) >= wanted for ids in parts):
            break
    shortest = min(map(len, parts))
    if shortest < wanted:
        raise InvalidRequest(
            f"the text has {shortest} tokens for one of its two parts, and --samples {count} times "
            f"--length {length} needs {wanted}; give more text, or lower one of them",
            field="text",
        )
    blocks = [torch.tensor(ids[:wanted]).view(count, length) for ids in parts]
    return Blocks(calibration=blocks[0], held_out=blocks[1])
