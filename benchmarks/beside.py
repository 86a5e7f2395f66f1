"""What does it cost those who stream that others' prompts are read, and what does it cost to read fewer at once?

    python benchmarks/beside.py            four budgets in turn, three times (about eight minutes)
    python benchmarks/beside.py --table    newest records → docs/benchmarks.md

The same requests, two for each place, so that half of the prompts come while answers go on.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.beside_run import main

    typer.run(main)
