"""Python's interpreter and its threads as a server wants them: short turns, no long pauses, names.

The engine's thread shares the interpreter with the event loop and with loads. Measured on two cores: see
docs/log.md.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

# The engine's Python shares the interpreter with the event loop: with the default of 5 ms a unary
# call waits 4 ms for its turn, with this 1 ms.
SWITCH_INTERVAL_S = 0.0005


def share_fairly() -> None:
    """Let threads take turns more often; for the whole process."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def forget_what_stays() -> None:
    """Take everything that is there now out of the garbage collector's view; for the whole process.

    A collection of the oldest generation looks at every object and holds the interpreter meanwhile: with torch
    and transformers imported and a model built, most of a decode step's time. It comes when enough new
    objects live, as those of an adapter's load do. What was built until now lives as long as the process.
    """
    gc.collect()
    gc.freeze()


def name_thread(name: str) -> None:
    """Name the calling thread, and those of the maths that it will start, as `top -H` shows them (Linux).

    At most 15 bytes.
    """
    comm = Path("/proc/thread-self/comm")
    if comm.exists():
        comm.write_text(name)
