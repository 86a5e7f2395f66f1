"""Measure every figure that the project promises; one line each, and an exit code.

    make verify-main                                  everything; about 45 minutes on 2 quiet cores
    python scripts/verify_main.py --only demo         one part: readme, check, test, demo, bench
    python scripts/verify_main.py --reuse-demo        keep what an earlier demo has trained

It measures the checkout it stands in. Output of what it runs goes to .lorary/verify/<part>.log,
all figures to .lorary/verify/figures.json. A part that is not run is said to be not run, and only
--only leaves one out. Exit 0: every figure reaches its bar; 1: one is short.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from scripts.verify_run import main

    typer.run(main)
