"""What does a GPU make of it: many adapters beside none, other libraries, kernels, training?

    python benchmarks/gpu.py                          everything, on one NVIDIA GPU of 40 GB or more
    python benchmarks/gpu.py --only copy --only kernels
    python benchmarks/gpu.py --only decode-bf16 --rows 32,64 --steps 24
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --shape tiny   the same code, no figures
    python benchmarks/gpu.py --table --out FILE       its records → docs/benchmarks.md

The base has the shape of Llama-3-8B and random weights, made on the device: nothing is downloaded. A
record is written as soon as it is measured, so a run that is killed keeps what it had.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.gpu_run import main

    typer.run(main)
