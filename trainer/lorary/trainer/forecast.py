"""What ``lorary train --dry-run`` says about memory and time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lorary.registry.manifest import SERVED_KINDS
from lorary.trainer.estimate import available_bytes, estimate_memory, rehearse

if TYPE_CHECKING:
    from lorary.trainer.progress import Reporter
    from lorary.trainer.train import Prepared


def forecast(prepared: Prepared, reporter: Reporter) -> dict[str, Any]:
    """Return what a run will take; real steps are rehearsed only where memory allows.

    Returns:
        ``memory_bytes`` (parts and ``total``; None for a task kind whose model is no causal language
        model), ``available_bytes``, and ``rehearsal`` if there was one.

    Raises:
        What ``train`` raises up to the end of the fit.
    """
    available = available_bytes(prepared.recipe.training.device)
    facts: dict[str, Any] = {"memory_bytes": None, "available_bytes": available}
    if prepared.recipe.task.kind in SERVED_KINDS:
        memory = estimate_memory(prepared)
        facts["memory_bytes"] = dataclasses.asdict(memory) | {"total": memory.total}
        if memory.total - memory.process > available:
            return facts
    rehearsal = rehearse(prepared, reporter)
    return facts | {"rehearsal": dataclasses.asdict(rehearsal)}


def forecast_rows(found: dict[str, Any]) -> dict[str, str]:
    """Return a forecast as people read it, by what it is about."""
    rows = {}
    if found["memory_bytes"] is not None:
        parts = {name: f"{size / 1e9:.2f}" for name, size in found["memory_bytes"].items()}
        total = parts.pop("total")
        sum_of = " + ".join(f"{size} {name}" for name, size in parts.items())
        rows["memory (GB)"] = f"{total} = {sum_of}"
    rows["memory free now (GB)"] = f"{found['available_bytes'] / 1e9:.2f}"
    rehearsal = found.get("rehearsal")
    if rehearsal is None:
        rows["time"] = "not rehearsed: the memory would not be enough"
        return rows
    rows["rehearsed (GB)"] = f"{rehearsal['peak_memory_bytes'] / 1e9:.2f}"
    expected = rehearsal["expected_memory_bytes"]
    if expected is not None:
        rows["rehearsed (GB)"] += f", of which arithmetic says {expected / 1e9:.2f}"
    rows["fit"] = f"{rehearsal['fit_seconds']:.0f} s at {rehearsal['tokens_per_s']:.0f} tokens/s"
    return rows
