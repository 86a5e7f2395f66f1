"""What does each method of training, and each kind of task, learn, cost and weigh on real data?

    python benchmarks/methods.py                        every method, one process each
    python benchmarks/methods.py --only lora --only dora
    python benchmarks/methods.py --table                newest records → docs/benchmarks.md
    python benchmarks/methods.py kinds                  one adapter of every task kind; the same options

The recipe is recipes/sentiment.yaml, shortened by --steps and --num-test, with each method's own learning
rate (``RATES``). Seconds of a step are a median without the first; peak memory is the process's, base
and evaluation included. The adapter is pushed to a registry, and its size, error and ranks are of what is
kept. ``full`` has two rows: the model as it was trained, and the adapter that its change was cut to.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    if sys.argv[1:2] == ["kinds"]:
        del sys.argv[1]
        from benchmarks.kinds_run import main as kinds

        typer.run(kinds)
    else:
        from benchmarks.methods_run import main

        typer.run(main)
