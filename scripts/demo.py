"""The main job as one command: train three adapters, publish, serve and call them, and compare.

    make demo                      or: python scripts/demo.py
    python scripts/demo.py --fresh           forget what earlier runs have finished
    python scripts/demo.py --only sentiment  one task (not the whole job)

Finished steps are kept below .lorary/demo and used again while recipe, base and versions are the
same, so it may be interrupted and run again. It ends with 1 when an adapter is worse through the
server than the trainer said by more than noise.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from scripts.demo_run import main

    typer.run(main)
