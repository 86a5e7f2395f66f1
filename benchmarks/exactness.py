"""Does the engine answer as PEFT in float32 does? Many answers, all adapters and the base, mixed.

    python benchmarks/exactness.py                    66 answers in each mode, about 8 minutes
    python benchmarks/exactness.py --modes float32    one mode
    python benchmarks/exactness.py --table            newest records → docs/benchmarks.md

The engine runs with the server's own defaults, prefix cache and drafts included; PEFT answers one
request at a time. In float32 the only allowed difference is a *tie*: two tokens whose logits PEFT
itself puts less than 1e-4 apart. Every difference is in the records, with that gap.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.exactness_run import main

    typer.run(main)
