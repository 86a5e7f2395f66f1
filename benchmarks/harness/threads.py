"""Pin every worker thread to a core of its own, before torch is imported.

A scheduler may put two runnable threads on one core while another is half idle; OpenMP barriers
then spin for whole time slices (a decode loop was seen to fall from 24 to 1 token/s). OpenMP reads
its environment when its library is loaded, so a process that lacks it starts itself again.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = "LORARY_BENCH_CORES"


def pin_threads(num_threads: int = 0) -> int:
    """Bind OpenMP's threads to cores, and tell torch how many there are.

    Does not return in a process whose environment is not set yet: it is replaced by a new one with
    the same arguments. Call it before anything imports torch.

    Args:
        num_threads: how many; 0 takes every core this process may use.

    Returns:
        How many threads are used.
    """
    if _MARK not in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        chosen = cores[: num_threads or len(cores)]
        os.environ.update(
            {
                _MARK: ",".join(map(str, chosen)),
                "OMP_NUM_THREADS": str(len(chosen)),
                "OMP_PROC_BIND": "true",
                "OMP_PLACES": ",".join(f"{{{core}}}" for core in chosen),
                "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
                "TOKENIZERS_PARALLELISM": "false",
            }
        )
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    import torch

    count = len(pinned_cores())
    torch.set_num_threads(count)
    return count


def pinned_cores() -> list[int]:
    """Return the cores that threads are pinned to; after ``pin_threads``."""
    return [int(core) for core in os.environ[_MARK].split(",")]


def plain_environment() -> dict[str, str]:
    """Return this process' environment as it was, for a child that pins its threads itself."""
    ours = {_MARK, "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES"}
    return {name: value for name, value in os.environ.items() if name not in ours}


@contextmanager
def all_cores() -> Iterator[None]:
    """Give this thread every core again while a child process is started.

    A child inherits the mask of the thread that starts it, and OpenMP has bound ours to one core.
    """
    bound = os.sched_getaffinity(0)
    unbind()
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def unbind() -> None:
    """Give this thread, and those that it will start, every core again, for good.

    For an engine that pins its own threads as the server's does: what it starts beside them (loads) would share
    this thread's one core, and leave the other to nobody.
    """
    os.sched_setaffinity(0, set(pinned_cores()))
