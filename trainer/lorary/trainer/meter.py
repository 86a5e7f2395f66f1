"""How fast a run goes and how much memory it takes, step by step."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class StepMeter:
    """Times optimizer steps whose numbers of tokens are known beforehand.

    Args:
        tokens: unpadded tokens of each step.
        device: whose memory is looked at.
    """

    def __init__(self, tokens: Sequence[int], device: str) -> None:
        self._tokens = tokens
        self._device = device
        self._started = 0.0
        self._seconds = 0.0
        self._num_tokens = 0
        self._last: dict[str, float] = {}

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def stop(self, step: int) -> None:
        """Step number ``step``, counted from 1, has ended."""
        seconds = time.perf_counter() - self._started
        tokens = self._tokens[step - 1]
        self._seconds += seconds
        self._num_tokens += tokens
        self._last = {
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
            "memory_bytes": memory_bytes(self._device),
        }

    @property
    def figures(self) -> dict[str, float]:
        """Of the last step: ``tokens``, ``seconds``, ``tokens_per_s``, ``memory_bytes``."""
        return dict(self._last)

    @property
    def tokens_per_s(self) -> float:
        """Over all steps so far."""
        return self._num_tokens / self._seconds


def memory_bytes(device: str) -> int:
    """Return what is in use: of the GPU by torch, or of the machine by this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    return peak_memory_bytes(device)


def peak_memory_bytes(device: str) -> int:
    """Return the most that has been in use since the process began."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
