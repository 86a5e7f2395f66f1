"""How fast is a registry in a folder, beside `cp` and `sha256sum`, and how much memory does it take?

    python benchmarks/registry.py                       all figures (2 min and 20 GB of disk)
    python benchmarks/registry.py --only transfer       one of them; --help lists them
    python benchmarks/registry.py --table               newest records → docs/benchmarks.md

Every figure is taken in a process of its own. `cp` and `sha256sum` read and write the same bytes in the same
folder, once; a push reads, checks, rewrites and hashes a copy, a pull hashes another, and both sync it, which
`cp` does not: so the same with `sync FILE` after `cp` is measured, too.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.registry_run import main

    typer.run(main)
