"""A registry of very many adapters, made quickly: no model is loaded, one folder is there at a time."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from benchmarks.synthetic import STRENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorary.bases import Base
    from lorary.registry import Registry


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter with random numbers of its own.

    Attributes:
        name: in the registry.
        rank: of every layer.
        seed: of its numbers.
        targets: last parts of the names of the layers it changes; empty: every linear layer.
        invocation: an aLoRA's tokens; none for an adapter that is always on.
        first_layer: the first of the base's layers that it changes.
    """

    name: str
    rank: int
    seed: int
    targets: tuple[str, ...] = ()
    invocation: tuple[int, ...] = ()
    first_layer: int = 0


def fill(
    registry: Registry,
    base: Base,
    members: Sequence[Member],
    scratch: Path,
    *,
    aliases: Sequence[str] = (),
    said: Callable[[int], None] = lambda _done: None,
) -> None:
    """Push every member, behind these aliases; ``scratch`` holds one folder at a time and none at the end."""
    for done, member in enumerate(members, 1):
        write_adapter(base, scratch, member)
        registry.push(scratch, member.name, base=base.card, aliases=aliases)
        shutil.rmtree(scratch)
        said(done)


def write_adapter(base: Base, folder: Path, member: Member) -> None:
    """Write a PEFT folder: A as PEFT initialises it, B ~ N(0, ``STRENGTH``²), a scale of 2."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(member.seed)
    targets = set(member.targets) or {_last(module) for module in base.card.modules}
    tensors = {}
    for module, (width_out, width_in) in base.card.modules.items():
        if _last(module) not in targets or _layer(module) < member.first_layer:
            continue
        a = torch.empty(member.rank, width_in).uniform_(-1, 1, generator=generator)
        b = torch.empty(width_out, member.rank).normal_(0, STRENGTH, generator=generator)
        for letter, tensor in (("A", a / width_in**0.5), ("B", b)):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            tensors[key] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(
        r=member.rank,
        lora_alpha=2 * member.rank,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        alora_invocation_tokens=list(member.invocation) or None,
        layers_to_transform=list(range(member.first_layer, num_layers(base)))
        if member.first_layer
        else None,
    )
    config.save_pretrained(str(folder))


def num_layers(base: Base) -> int:
    """Return how many decoder layers a base has."""
    return 1 + max(map(_layer, base.card.modules))


def _layer(module: str) -> int:
    """Return the number in a module's name; -1 where there is none."""
    match = re.search(r"\.(\d+)\.", module)
    return int(match[1]) if match else -1


def adapter_bytes(base: Base, rank: int) -> int:
    """Bytes of an adapter on every linear layer, in bfloat16."""
    return 2 * rank * sum(sum(shape) for shape in base.card.modules.values())


def bytes_on_disk(folder: Path) -> int:
    """Bytes below a folder; what is linked twice counts once."""
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            status = os.stat(os.path.join(root, name))
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def forget_files(folder: Path) -> None:
    """Drop what the system keeps of these files in memory, so that a load reads the disk (Linux)."""
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def recall_files(folder: Path) -> None:
    """Have the system keep these files in memory, so that a load reads no disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            Path(root, name).read_bytes()


def _last(module: str) -> str:
    return module.rpartition(".")[2]
