"""Change what the output head of a causal language model reads, whatever the model's own code does."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


@contextmanager
def head_reads(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, the output head reads ``change(hidden)`` instead of hidden [B, T, D]."""

    def before(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return (change(hidden), *rest)

    from torch.nn.parallel import DistributedDataParallel

    bare = model.module if isinstance(model, DistributedDataParallel) else model
    handle = bare.get_output_embeddings().register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
