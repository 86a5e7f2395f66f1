"""Does anything of a server grow that has to stay flat?

    python benchmarks/soak.py                 half an hour
    python benchmarks/soak.py --minutes 480   a night
    python benchmarks/soak.py --table         newest records → docs/benchmarks.md and a picture

Answers come and go through both doors, over more adapters than fit; some callers go away in the middle, and new
versions are published and promoted all along. Memory, threads, open files and the event loop's tasks are read
every five seconds. A neighbour on the machine makes this slower, but nothing grow: no run is thrown away for it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.soak_run import main

    typer.run(main)
