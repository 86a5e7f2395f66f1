"""What is one document worth to several adapters? Keys and values of the base, read once for all of them.

    python benchmarks/reuse.py            one document after another, a base and four judges (five minutes)
    python benchmarks/reuse.py --table    newest records → docs/benchmarks.md

A pipeline, as in the paper on aLoRA (arXiv 2504.12397): the base answers over a document, then four adapters
judge document and answer, one after the other. Asked five times: the judges as aLoRAs; the same with the
prefix cache off; the same matrices as plain LoRA, of whose keys and values nobody else can use any; and
those of them in the last third of the layers, with the layers below shared (``--shared-layers``) and without.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import typer

    from benchmarks.reuse_run import main

    typer.run(main)
