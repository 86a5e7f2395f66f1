"""Record what a terminal shows of push, promote, a refused push and a rollback, into docs/registry.md.

    python scripts/transcript.py            run the commands in a fresh registry and write what they say
    python scripts/transcript.py --check    exit with 1 if they no longer say what stands there

Every line is what the real command printed; times and digests are the run's own, and are not compared.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from scripts.transcript_run import main

    typer.run(main)
