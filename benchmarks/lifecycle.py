"""What do adapters that come and go cost those that are there? Lorary's engine against itself.

    python benchmarks/lifecycle.py            everything, about 16 minutes on 2 quiet cores
    python benchmarks/lifecycle.py --table    newest records → docs/benchmarks.md

What each part is, and why it does not flatter us, is in ``lifecycle_parts``.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.lifecycle_run import main

    typer.run(main)
