"""How fast is training, beside PEFT and transformers' Trainer put together as tutorials do?

    python benchmarks/training.py             two shipped recipes, a few steps each (10 minutes on 2 quiet cores)
    python benchmarks/training.py --recipe sentiment --steps 8 --repeats 1
    python benchmarks/training.py --table     newest records → docs/benchmarks.md

The same rows, already tokenized, the same number of steps and rows a step, base, dtype, rank and target
modules. The plain loop shuffles rows, pads each batch to its longest row and lets the model compute logits
and loss over the whole sequence. Every run is a process of its own; contenders take turns.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.training_run import main

    typer.run(main)
