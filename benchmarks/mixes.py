"""What do very many adapters, and mixed ranks, cost? Lorary's engine against itself.

    python benchmarks/mixes.py            four cases, three repeats, about 6 minutes on 2 quiet cores
    python benchmarks/mixes.py --table    newest records → docs/benchmarks.md

The cases take turns. What each of them is, and why it does not flatter us, is in ``mix_cases``.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.mix_run import main

    typer.run(main)
