"""Where loads touch the device: on a stream of their own, and with one thread of the maths each."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lorary.server.maths_threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Iterator


NICENESS = 5
"""A third of the engine's share of a core that both want; all of one that nobody else does."""


class Transfers:
    """Gives each worker thread its side stream of a GPU; on a CPU there is nothing to give.

    Args:
        device: where the pool is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()

    @staticmethod
    def prepare_thread() -> None:
        """Let a worker stand back: the cores belong to the engine's steps.

        Its torch operators stay on its own thread, and where the system knows niceness of threads (Linux)
        it yields to the engine's: a step whose threads wait for each other loses more by a turn that one
        of them misses than a load does.
        """
        use_threads(1)
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)

    @contextmanager
    def side(self) -> Iterator[None]:
        """Queue the block's copies beside the engine's steps; they are done when it ends.

        They wait for what the engine had queued before, which may still read the pages' former content.
        """
        if self._device.type != "cuda":
            yield
            return
        stream = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
