"""What does Ray Serve's ingress cost? The same calls to a plain server and to one replica behind Serve, in turn.

    python benchmarks/ray_ingress.py            three rounds (three minutes)
    python benchmarks/ray_ingress.py --table    newest records → docs/scaling.md

Unary calls are `Tokenize`, which asks nothing of the model. Streams are short answers of the real base, so their
times hold the model's, which both share. One client, one connection, no client library.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.ray_ingress_run import main

    typer.run(main)
