"""How many replicas do adapters and traffic need? A closed form, held against a simulation call by call.

    python benchmarks/capacity.py              both, 100 to 10,000 adapters, 4 to 1,000 replicas (8 min)
    python benchmarks/capacity.py --only small the first two sizes (10 s)
    python benchmarks/capacity.py --table      newest records → docs/scaling.md
    python benchmarks/capacity.py --plan --adapters 2000 --calls 40 --answer 2.5 --rows 32 --places 400

No server runs, and nothing is timed: the figures are the same on every machine.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.capacity_run import main

    typer.run(main)
