"""One question per program, peers beside us (docs/benchmarks.md)."""

from lorary.bases.load import quiet_bitsandbytes

# Before any of them imports peft, which imports it: what it says would stand first in every output.
quiet_bitsandbytes()
