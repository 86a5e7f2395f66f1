"""What does the service cost beside its engine, and does the HTTP door cost throughput beside gRPC?

    python benchmarks/service.py                 everything, 15 minutes
    python benchmarks/service.py --only doors    one part; --help lists them
    python benchmarks/service.py --table         newest records → docs/benchmarks.md

What the parts are is in ``service_parts``; ``doors`` are the same streams through both, in turn, of one server.

Both are asked by the barest client there is, a stub and a socket, from this process: what a client library
costs is its own affair. The server's own processor time is measured, too, because that is what the doors differ in;
it holds the model's, which they share.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.service_run import main

    typer.run(main)
