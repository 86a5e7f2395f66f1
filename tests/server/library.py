"""Many small adapters for the tiny base, made without loading a model, and their answers when alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.registry import BaseCard

TARGETS = ("q_proj", "v_proj", "down_proj")


def write_adapter(card: BaseCard, folder: Path, *, rank: int, seed: int) -> Path:
    """Write a PEFT folder with random tensors, strong enough to change what the base says."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (width_out, width_in) in card.modules.items():
        if module.rpartition(".")[2] not in TARGETS:
            continue
        a = torch.empty(rank, width_in).normal_(0, width_in**-0.5, generator=generator)
        b = torch.empty(width_out, rank).normal_(0, 0.3, generator=generator)
        for letter, tensor in (("A", a), ("B", b)):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    config.save_pretrained(str(folder))
    return folder
