"""What the engine promises of a GPU, and how each promise is read from the records of ``gpu``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.gpu_tables import (
    MOST,
    WIDE,
    allowed_share,
    copy_bytes_per_s,
    decoded,
    peer,
    rate,
)
from scripts.trainer_figures import MEMORY_RATIO
from scripts.verify_figures import Figure, at_least, at_most

if TYPE_CHECKING:
    from pathlib import Path

OF_ALLOWED = 0.9
"""Of the speed that the adapters' bytes leave."""
TOKENS_PER_S = 9000.0
OF_PEFT = 10.0
OF_BATCHING = 1.2


def gpu_figures(path: Path) -> list[Figure]:
    """Read every figure that has a bar; what was not measured is short."""
    records = report.read(path) if path.exists() else []
    figures = [_of_allowed(records, base) for base in ("bf16", "nf4")]
    most = decoded(records, "bf16", MOST, mixed=True)
    figures.append(
        _figure(
            f"GPU: tokens/s with adapters at {MOST} rows, bf16",
            None if most is None else most["tokens_per_s"],
            TOKENS_PER_S,
        )
    )
    figures += [
        _times(records, "peft", WIDE, OF_PEFT, mixed=True),
        _times(records, "transformers", MOST, OF_BATCHING, mixed=False),
    ]
    figures += [_memory(records, gradient_checkpointing=kept) for kept in (True, False)]
    copied = copy_bytes_per_s(records)
    if most is not None and copied is not None:
        share = f"{rate(most) / 1e12:.2f} TB/s of {copied / 1e12:.2f} that it copies"
        figures.append(Figure(f"GPU: memory moved at {MOST} rows", share, "reported", is_ok=None))
    figures += [
        Figure(f"GPU: {r['part']}", "failed", "measured", is_ok=False, note=str(r["error"]))
        for r in records
        if r["kind"] == "failed"
    ]
    return figures


def _of_allowed(records: list[dict[str, Any]], base: str) -> Figure:
    bare = decoded(records, base, WIDE, mixed=False)
    mixed = decoded(records, base, WIDE, mixed=True)
    name = f"GPU: {WIDE} adapters' share of the speed that their bytes allow, {base}"
    if bare is None or mixed is None:
        return _figure(name, None, OF_ALLOWED)
    kept = mixed["tokens_per_s"] / bare["tokens_per_s"]
    return _figure(name, kept / allowed_share(mixed), OF_ALLOWED)


def _times(
    records: list[dict[str, Any]], name: str, rows: int, bar: float, *, mixed: bool
) -> Figure:
    ours, theirs = decoded(records, "bf16", rows, mixed=mixed), peer(records, name, rows)
    what = "with adapters" if mixed else "base only"
    times = (
        None if ours is None or theirs is None else ours["tokens_per_s"] / theirs["tokens_per_s"]
    )
    return _figure(f"GPU: decode {what} at {rows} rows, times {name}", times, bar)


def _memory(records: list[dict[str, Any]], *, gradient_checkpointing: bool) -> Figure:
    how = "computed again" if gradient_checkpointing else "kept"
    name = f"GPU: QLoRA's peak memory, activations {how}, times what arithmetic says"
    found = [
        r
        for r in records
        if r["kind"] == "training" and r["gradient_checkpointing"] == gradient_checkpointing
    ]
    ratios = [round(r["peak_memory_bytes"] / r["expected_memory_bytes"], 3) for r in found]
    return at_most(name, ratios[-1] if ratios else None, MEMORY_RATIO)


def _figure(name: str, value: float | None, bar: float) -> Figure:
    return at_least(name, None if value is None else round(value, 3), bar)
