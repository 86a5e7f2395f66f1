"""What a manifest says about how a run was made, beyond its recipe: machine, losses, quantized probes.

All of it lies in the manifest's ``training``, which is free in form, so that older readers pass over it::

    "hardware": {"cpu": "AMD EPYC …", "cpus": 2, "memory_bytes": 8589934592, "gpus": [], "system": "Linux …"},
    "loss_curve": {"steps": [1, 2, …], "loss": […], "validation_steps": [15, …], "validation_loss": […]},
    "golden_logits": {"none": [[…], …], "nf4": [[…], …], "int8": [[…], …]},
    "uncut": {"metrics": {"accuracy": 0.9}, "kept_share": 0.4, "rank_90": 210, "stable_rank": 9.1}

``golden_logits`` has, for each golden probe, the logits of its ``top_token_ids`` over the base in other
quantizations than the probe's own: what a server that quantizes should see. ``uncut`` is there where more was
trained than the adapter holds (``methods.full``).
"""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorary.bases.load import QUANTIZATIONS
from lorary.trainer.output import next_logits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.bases import Base
    from lorary.registry.manifest import GoldenProbe, Metrics

MAX_POINTS = 512


def hardware() -> dict[str, Any]:
    """Return what this machine is: CPU, memory, GPUs, system."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "system": platform.platform(),
    }


def loss_curve(history: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the losses of a run, every bit of each; of more than ``MAX_POINTS``, as many, evenly chosen.

    Args:
        history: entries with ``step`` and ``loss`` or ``eval_loss``, as ``Fit`` has them.
    """
    train = _thinned([(row["step"], row["loss"]) for row in history if "loss" in row])
    held = _thinned([(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row])
    return {
        "steps": [step for step, _ in train],
        "loss": [loss for _, loss in train],
        "validation_steps": [step for step, _ in held],
        "validation_loss": [loss for _, loss in held],
    }


def golden_logits(
    folder: Path, base: Base, probes: Sequence[GoldenProbe], *, recorded: str, device: str
) -> dict[str, list[list[float]]]:
    """Read each probe's logits over the base in every quantization but the one ``recorded``.

    Base and saved adapter are loaded afresh for each; arithmetic is float32, so that nothing but the
    quantization differs. Without bitsandbytes there is only ``none``.
    """
    import peft

    has_bitsandbytes = find_spec("bitsandbytes") is not None
    has_magnitudes = getattr(peft.PeftConfig.from_pretrained(str(folder)), "use_dora", False)
    found: dict[str, list[list[float]]] = {}
    for quantization in QUANTIZATIONS:
        if quantization == recorded or not probes:
            continue
        if quantization != "none" and not has_bitsandbytes:
            continue
        if quantization == "int8" and has_magnitudes:
            continue  # peft 0.21 cannot read an int8 weight back, whose rows DoRA measures
        prompts = [probe.token_ids for probe in probes]
        read = next_logits(folder, base, prompts, quantization=quantization, device=device)
        found[quantization] = [
            [round(value, 4) for value in logits[list(probe.top_token_ids)].tolist()]
            for probe, logits in zip(probes, read, strict=True)
        ]
    return found


def uncut_facts(uncut: Metrics, model: Any) -> dict[str, Any]:
    """Return what a manifest says of a run that learned more than its adapter holds.

    Args:
        uncut: the adapter beside what was trained, as its base.
        model: wrapped by PEFT, cut (``Attached.cut``).

    Returns:
        ``metrics`` of what was trained; ``kept_share`` of ‖ΔW‖² over all modules; and ``rank_90`` and
        ``stable_rank`` of ΔW, medians over modules (``report.ranks``).
    """
    from lorary.trainer.report.ranks import ranks_of
    from lorary.trainer.report.weights import module_changes

    found: dict[str, Any] = {"metrics": uncut.base}
    ranks = ranks_of(module_changes(model))
    if ranks is not None:
        found |= {
            "kept_share": ranks.kept_share,
            "rank_90": ranks.rank_90,
            "stable_rank": ranks.stable_rank,
        }
    return found


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Keep the first, the last, and evenly many between."""
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _cpu_name() -> str:
    """Return the processor's name as the system has it; on Linux from /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()
