"""How many CPU threads a run uses, set before torch reads it."""

from __future__ import annotations

import os
import sys

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def use_threads(count: int | None) -> int:
    """Let torch, OpenMP and BLAS use ``count`` threads; by default the CPUs this process may use.

    More threads than CPUs make OpenMP's barriers wait on descheduled threads, which is an order of
    magnitude slower, so an explicit ``OMP_NUM_THREADS`` is respected and a larger count is cut.

    Returns:
        The count in effect.
    """
    available = len(os.sched_getaffinity(0))
    configured = os.environ.get("OMP_NUM_THREADS", "")
    if count is None:
        count = int(configured) if configured.isdigit() and int(configured) > 0 else available
    count = max(1, min(count, available))
    for variable in _VARIABLES:
        os.environ[variable] = str(count)
    # Waiting threads spin for a moment, then sleep. A team that spins until its time slice ends shares
    # a core with a busy neighbour and trains at a twelfth of the speed (20 instead of 258 tokens/s);
    # one that never spins loses a sixth on a quiet machine (320 instead of 375; docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    # The tokenizer's own threads fork badly and gain nothing on short texts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)
    return count
