"""How many threads torch's operators, and the native kernels that ask it, use on the calling thread."""

from __future__ import annotations

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)

_PAUSE_SOFT = 1
"""``omp_pause_soft`` (OpenMP 5.0, section 3.6.1): what the runtime keeps may be kept, its threads go."""


def use_threads(count: int) -> None:
    """Have the calling thread work with ``count`` threads, whatever other threads set for themselves.

    ``torch.set_num_threads`` also keeps its number for the process, and a thread that asks for the first
    time takes that one, even when it has set its own before: an engine that had not made a step yet went down to
    one thread for good when the first load set 1. So the asking comes first.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def let_helpers_go() -> None:
    """End the threads that helped the calling thread; its next operator starts others.

    libgomp counts the helpers of all threads. Once they are more than there are cores, whoever waits spins for a
    thousandth of the time and then sleeps, and waking is dear: steps of one row took 12.5 ms instead of 10.3, and
    with an adapter 17 instead of 11, beside helpers of the thread that had loaded the base and was idle.
    """
    runtime = ctypes.CDLL(torch._C.__file__)
    try:
        pause = runtime.omp_pause_resource_all
    except AttributeError:
        logger.debug("this torch's OpenMP cannot let threads go; idle ones may slow down steps")
        return
    if pause(_PAUSE_SOFT):
        logger.warning(
            "OpenMP keeps the threads that helped to build the engine; steps may be slower"
        )
