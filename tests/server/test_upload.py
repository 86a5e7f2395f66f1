"""What travels in one piece arrives as it was."""

from __future__ import annotations

import pytest
import torch

from lorary.server.engine.upload import pack, unpack, upload

PARTS = [
    torch.tensor([[3, 1, 2]]),
    torch.tensor([], dtype=torch.int32),
    torch.tensor([7], dtype=torch.int32),
    torch.tensor([[0.5, -2.0], [1e-3, 9.0]]),
    torch.tensor([0.1], dtype=torch.float64),
    # As a table of blocks comes: not in one piece.
    torch.arange(12, dtype=torch.int32).view(3, 4)[:, :3],
]


def test_parts_come_out_as_they_went_in() -> None:
    packed = pack(PARTS, pin=False)
    assert packed.dtype == torch.uint8
    for part, found in zip(PARTS, unpack(packed, PARTS), strict=True):
        assert found.dtype == part.dtype
        assert torch.equal(found, part)
        assert found.storage_offset() * found.itemsize % 16 == 0


def test_nothing_is_copied_on_a_cpu() -> None:
    for part, found in zip(PARTS, upload(PARTS, torch.device("cpu")), strict=True):
        assert found is part


@pytest.mark.gpu
def test_a_gpu_gets_all_in_one_copy() -> None:
    found = upload(PARTS, torch.device("cuda"))
    assert len({part.untyped_storage().data_ptr() for part in found}) == 1
    for part, there in zip(PARTS, found, strict=True):
        assert torch.equal(there.cpu(), part)
