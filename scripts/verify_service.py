"""Measure every figure that the service at its edge promises; one line each, and an exit code.

    make verify-service                                    everything, half an hour of it a soak
    python scripts/verify_service.py --only doors          one part; --help lists them

It measures the checkout it stands in. Output of what it runs goes to .lorary/verify/<part>.log, the
benchmarks' records to .lorary/verify/*.jsonl, all figures to .lorary/verify/service-figures.json. A part
that is not run is said to be not run. Exit 0: every figure reaches its bar; 1: one is short.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from scripts.service_run import main

    typer.run(main)
