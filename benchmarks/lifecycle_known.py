"""What knowing very many adapters costs a server: memory, and the time to resolve a ref.

    python -m benchmarks.lifecycle_known make REGISTRY COUNT      a registry that knows so many
    python -m benchmarks.lifecycle_known measure REGISTRY COUNT   one line of JSON

Measured in a process of its own, so that its memory is that of the server's parts alone: the registry
and the targets that the service resolves refs through. All adapters have one version, an alias, and the
files of one pushed adapter; but each has a digest of its own, by which tasks are remembered.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.registry import Registry

TEMPLATE = "known-0"
NUM_TIMED = 20_000


def name_of(number: int) -> str:
    """Return an adapter's name."""
    return f"known-{number}"


def make(folder: Path, count: int) -> None:
    """Give a registry that knows ``known-0`` (with alias ``prod``) so many adapters in all."""
    from lorary.registry.aliases import AliasLog
    from lorary.registry.versions import Versions

    root = folder / "adapters"
    pointer = Versions(root / TEMPLATE / "versions").pointer(1)
    assert pointer is not None
    moves = (root / TEMPLATE / "aliases.jsonl").read_bytes()
    assert AliasLog(root / TEMPLATE / "aliases.jsonl", root / TEMPLATE / "lock").state()
    for number in range(1, count):
        name = name_of(number)
        digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        versions = root / name / "versions"
        versions.mkdir(parents=True)
        (versions / "1.json").write_bytes(replace(pointer, digest=digest).to_json())
        (root / name / "aliases.jsonl").write_bytes(moves)


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Resolve every ref, then many at random; return bytes and microseconds."""
    from lorary.registry import Registry
    from lorary.server.targets import Targets

    registry: Registry = Registry.open(folder, watch=True)
    fingerprint = registry.manifest(registry.resolve(TEMPLATE)).base.fingerprint
    targets = Targets(registry, base="measured", fingerprint=fingerprint)
    refs = [f"{name_of(number)}@prod" for number in range(count)]
    asyncio.run(_resolve_all(targets, refs[:1]))
    gc.collect()
    before = _resident_bytes()
    asyncio.run(_resolve_all(targets, refs))
    gc.collect()
    after = _resident_bytes()
    targets.close()
    return {"known": count, "added_bytes": after - before, "resolve_us": resolve_us(registry, refs)}


def resolve_us(registry: Registry, refs: Sequence[str]) -> dict[str, float]:
    """Return percentiles of the microseconds that resolving a known ref takes, drawn at random."""
    drawn = random.Random(0).choices(refs, k=NUM_TIMED)
    taken = []
    for ref in drawn:
        started = time.perf_counter_ns()
        registry.resolve(ref)
        taken.append((time.perf_counter_ns() - started) / 1000)
    cuts = statistics.quantiles(taken, n=100)
    return {"p50": round(cuts[49], 2), "p95": round(cuts[94], 2), "p99": round(cuts[98], 2)}


async def _resolve_all(targets: Any, refs: Sequence[str]) -> None:
    for ref in refs:
        await targets.resolve(ref)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Do what the command line says."""
    action, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if action == "make":
        make(folder, count)
    else:
        sys.stdout.write(json.dumps(measure(folder, count)) + "\n")


if __name__ == "__main__":
    main()
