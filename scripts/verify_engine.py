"""Measure every figure that the engine promises; one line each, and an exit code.

    make verify-engine                                  everything, peers included
    python scripts/verify_engine.py --only step         one part; --help lists them
    python scripts/verify_engine.py --resume            keep what this commit has measured whole

It measures the checkout it stands in. Output of what it runs goes to .lorary/verify/<part>.log, all
records to .lorary/verify/engine-<part>.jsonl, all figures to .lorary/verify/engine-figures.json. A
part that is not run is said to be not run. Exit 0: every figure reaches its bar; 1: one is short.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from scripts.engine_run import main

    typer.run(main)
