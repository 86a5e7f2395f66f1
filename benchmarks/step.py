"""Where does the time of one decode step go? What is not native must stay small beside what is.

    python benchmarks/step.py            steps of 1, 8 and 32 rows, as many adapters (half a minute)
    python benchmarks/step.py --table    newest records → docs/benchmarks.md

Real steps of the real engine, on this thread, so without the waiting for Python's lock that a busy
event loop adds; with its metrics, and the wake-up of an event loop. *Overhead* is the whole step but for
what runs in the native kernels: the layers and the head, which alone are timed meanwhile. Answers are
greedy. The parts are timed in other steps, and what timing them costs is in them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.step_run import main

    typer.run(main)
