"""How close does a step come to what this machine can do?

    python benchmarks/roofline.py            bandwidth and peaks, decode and prompts (5 minutes)
    python benchmarks/roofline.py --table    newest records → docs/benchmarks.md

Bandwidth and peaks are the best of several ways, torch's and our own kernels', measured again and
again while a step is. A step's *bound* is the longer of two times: to read its bytes once, and to multiply at the
peak. The time beside it is the whole step's, Python and sampling included.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.roofline_run import main

    typer.run(main)
