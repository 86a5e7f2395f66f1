"""Measure every figure that adapters in production promise; one line each, and an exit code.

    make verify-lifecycle                                  everything
    python scripts/verify_lifecycle.py --only lifecycle    one part; --help lists them
    python scripts/verify_lifecycle.py --resume            keep what this commit has measured whole

It measures the checkout it stands in. Output of what it runs goes to .lorary/verify/<part>.log, records
to .lorary/verify/lifecycle-<part>.jsonl, all figures to .lorary/verify/lifecycle-figures.json. A part
that is not run is said to be not run. Exit 0: every figure reaches its bar; 1: one is short.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from scripts.lifecycle_run import main

    typer.run(main)
