"""Where does folding an adapter into a copy of the base's weights pay? One adapter in every row, both ways.

    python benchmarks/merged.py            1, 8 and 32 rows, batched and merged in turn (about two minutes)
    python benchmarks/merged.py --table    newest records → docs/benchmarks.md

Real steps of the real engine, on this thread, without a server around it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.merged_run import main

    typer.run(main)
