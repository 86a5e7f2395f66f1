"""How many threads torch's operators, and the native kernels that ask it, use on the calling thread."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Have the calling thread work with ``count`` threads, whatever other threads set for themselves.

    ``torch.set_num_threads`` also keeps its number for the process, and a thread that asks for the first
    time takes that one, even when it has set its own before: an engine that had not made a step yet went down to
    one thread for good when the first load set 1. So the asking comes first.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)
