"""``lorary serve`` whose model is computed elsewhere: a step waits as one on a GPU does, and uses no core.

Everything else is the server's own, the engine's thread and scheduler included; only the model's answer is not:
the same token for everybody, and the same row of logits for who asks for more than the most likely one. For what the
service costs where the cores are its own. Greedy rows have no logits here, as a GPU keeps them: those of 256 rows are
50 MB, and to write and read them took these cores longer than the step.

    STEP_MS=33 python -m benchmarks.harness.distant_server serve --base smollm2-135m …
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import torch

from lorary.cli.main import main
from lorary.server.apart import child, process
from lorary.server.engine.runner import Runner

if TYPE_CHECKING:
    from lorary.server.engine.batch import Batch

STEP_S = float(os.environ["STEP_MS"]) / 1000
TOKEN = 314
"""What every answer repeats; any token of letters."""


@torch.inference_mode()
def _forward(self: Runner, batch: Batch) -> torch.Tensor | list[int]:
    time.sleep(STEP_S)
    if batch.is_greedy:
        return [TOKEN] * len(batch.logits_rows)
    logits = torch.zeros(len(batch.logits_rows), self.vocab_size)
    logits[:, TOKEN] = 1.0
    return logits


if __name__ == "__main__":
    Runner.forward = _forward  # type: ignore[method-assign]
    # An engine's own process (``--engine-process``) is this module, too.
    process.MODULE = "benchmarks.harness.distant_server"
    if sys.argv[1] == "serve":
        main()
    else:
        child.main()
