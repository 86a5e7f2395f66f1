"""Adapters whose greedy answers differ from the base's: real PEFT folders, pushed to a registry."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lorary.registry import Manifest
from lorary.registry.manifest import BaseIdentity, Method, Task

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.bases import Base
    from lorary.registry import Registry

RANK = 16
ALPHA = 32
STRENGTH = 0.03
"""Standard deviation of B; A keeps PEFT's own initialisation."""


def make_adapters(
    base: Base, root: Path, count: int, *, said: Callable[[int], None] = lambda _done: None
) -> dict[str, Path]:
    """Write ``count`` adapters on every linear layer below ``root``; return name to folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    from lorary.bases.load import load_model
    from lorary.trainer.quiet import quiet_libraries

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = load_model(base, quantization="none", dtype=torch.bfloat16, device="cpu")
    with quiet_libraries():
        peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    folders = {}
    for index in range(count):
        name = f"bench-{index:02d}"
        torch.manual_seed(1000 + index)
        with torch.no_grad():
            for parameter_name, parameter in peft.named_parameters():
                if "lora_A" in parameter_name:
                    torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
                elif "lora_B" in parameter_name:
                    parameter.normal_(0, STRENGTH)
        folder = root / name
        peft.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        _write_manifest(base, folder)
        folders[name] = folder
        said(index + 1)
    return folders


def push_adapters(
    registry: Registry,
    base: Base,
    folders: dict[str, Path],
    *,
    said: Callable[[int], None] = lambda _done: None,
) -> None:
    """Push every folder under its name."""
    for done, (name, folder) in enumerate(folders.items(), 1):
        registry.push(folder, name, base=base.card)
        said(done)


def _write_manifest(base: Base, folder: Path) -> None:
    raw = json.loads((folder / "adapter_config.json").read_text())
    manifest = Manifest(
        base=BaseIdentity(
            name=base.name,
            fingerprint=base.card.fingerprint,
            architecture=base.card.architecture,
        ),
        method=Method(
            name="lora",
            rank=RANK,
            alpha=float(ALPHA),
            target_modules=tuple(sorted(raw["target_modules"])),
        ),
        task=Task(),
        created_at="2026-01-01T00:00:00Z",
        description="random, for benchmarks",
    )
    (folder / "manifest.json").write_text(manifest.to_json())
