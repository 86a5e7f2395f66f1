"""Pages of mapped weights: kept while they are few, let go of when they are many, and read again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorary.bases.mapped import ENOUGH_BYTES, MappedFiles, Readings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Thirty-two weights of a mebibyte, on the disk."""
    path = tmp_path / "weights.safetensors"
    save_file({f"{i:02}": torch.full((MIB // 4,), float(i)) for i in range(32)}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())  # what is not on the disk yet stays in memory
    return path


def mapped(path: Path) -> list[torch.Tensor]:
    with safe_open(path, "pt") as file:
        return [file.get_tensor(name) for name in sorted(file.keys())]


def resident(path: Path) -> int:
    """Return how many bytes of a mapped file are resident in this process."""
    size = 0
    is_wanted = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            is_wanted = line.endswith(str(path))
        elif is_wanted and line.startswith("Rss:"):
            size += int(line.split()[1]) * 1024
    return size


def test_what_was_read_is_let_go_of_once_it_is_enough(weights: Path) -> None:
    tensors = mapped(weights)
    readings = Readings([weights])
    few = ENOUGH_BYTES // MIB // 2
    assert [float(tensor.mean()) for tensor in tensors[:few]] == list(range(few))
    readings.release_enough()
    assert resident(weights) >= few * MIB
    for tensor in tensors:
        tensor.sum()
    readings.release_enough()
    assert resident(weights) < few * MIB
    assert [float(tensor[-1]) for tensor in tensors] == list(range(32))


def test_tensors_of_files_are_let_go_of_and_others_left(weights: Path) -> None:
    tensors = mapped(weights)
    own = torch.ones(MIB)
    files = MappedFiles()
    for tensor in tensors:
        tensor.sum()
    files.release([own, *tensors[:16]])
    # The neighbours share a page with what was let go of.
    assert 15 * MIB <= resident(weights) <= 17 * MIB
    assert float(own.sum()) == MIB
    assert [float(tensor[-1]) for tensor in tensors] == list(range(32))


def test_a_module_gets_memory_of_its_own(weights: Path) -> None:
    module = torch.nn.Module()
    for number, tensor in enumerate([*mapped(weights)[:4], torch.ones(3)]):
        module.register_parameter(str(number), torch.nn.Parameter(tensor, requires_grad=False))
    del tensor
    MappedFiles().own(module)
    assert [float(tensor[-1]) for tensor in module.parameters()] == [0.0, 1.0, 2.0, 3.0, 1.0]
    assert str(weights) not in Path("/proc/self/maps").read_text()
