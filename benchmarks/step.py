"""Where does the time of one decode step go? What is not native must stay small beside what is.

    python benchmarks/step.py            steps of 1, 8 and 32 rows, as many adapters (half a minute)
    python benchmarks/step.py --table    newest records → docs/benchmarks.md

Real steps of the real engine, on this thread, so without the waiting for Python's lock that a busy
event loop adds. *Overhead* is the whole step but for what runs in the native kernels: the layers and
the head. Sampling counts as overhead, although most of it is native.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.step_run import main

    typer.run(main)
