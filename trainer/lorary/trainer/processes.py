"""A run in several processes, one per device, as ``accelerate launch`` or ``torchrun`` start them.

Process 0 evaluates and writes; the others train beside it. Which one this is, the launcher says in
environment variables, so no torch is needed to ask.
"""

from __future__ import annotations

import os


def num_processes() -> int:
    """Return how many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Return this process's place among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process evaluates, writes and talks."""
    return process_index() == 0


def local_device(device: str) -> str:
    """Return the device of this process: its own GPU where the recipe just says ``cuda``."""
    index = os.environ.get("LOCAL_RANK")
    return f"cuda:{index}" if device == "cuda" and index is not None else device


def any_of(flag: bool) -> bool:
    """Return whether any process says so; all must ask at the same moment."""
    if num_processes() == 1:
        return flag
    import torch
    from accelerate import PartialState

    votes = torch.tensor([float(flag)], device=PartialState().device)
    torch.distributed.all_reduce(votes)
    return bool(votes.item())
