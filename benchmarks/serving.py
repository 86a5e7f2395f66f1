"""How fast are many adapters at once? Lorary beside PEFT's mixed batch, in the same run.

    python benchmarks/serving.py                                  the whole matrix (about 50 min)
    python benchmarks/serving.py --adapters 8 --concurrency 8     one cell
    python benchmarks/serving.py --through grpc                   over a real server process
    python benchmarks/serving.py --table                          results → docs/benchmarks.md

Contenders take turns, so that a change of the machine's mood hits all of them; every run notes how
much processor time others took, and is repeated when it was more than a tenth of a core.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.cli import main

    typer.run(main)
