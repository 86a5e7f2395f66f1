"""What a load does natively: the same bits as torch operators, and squares that never lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from lorary.errors import CorruptArtifact
from lorary.registry.safetensors_file import TensorInfo
from lorary.server.adapters.loader import LoadedAdapter, ReadBuffer, TensorBytes
from lorary.server.adapters.pool import AdapterPool, GroupSpec
from lorary.server.native import library as native

if TYPE_CHECKING:
    from pathlib import Path

GROUPS = [
    GroupSpec(("l.q_proj", "l.k_proj"), 72, (72, 20)),
    GroupSpec(("l.o_proj",), 72, (131,)),
]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.fixture(scope="module")
def kernels() -> native.NativeKernels:
    found = native.load()
    assert isinstance(found, native.NativeKernels), found
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_rows_are_laid_as_torch_lays_them(
    kernels: native.NativeKernels, dtype: torch.dtype, source: torch.dtype
) -> None:
    """Scattered pages, ranks below the adapter's, a module that it leaves alone, column scales."""
    pools = [
        AdapterPool(
            GROUPS, memory_bytes=1 << 18, dtype=dtype, device=torch.device("cpu"), kernels=kernels_
        )
        for kernels_ in (None, kernels)
    ]
    generator = torch.Generator().manual_seed(0)

    def pair(rank: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(s, generator=generator) for s in ((rank, 72), (out, rank)))
        return a.to(source), b.to(source)

    rank = 11
    for columns in (None, {"l.o_proj": torch.randn(131, generator=generator)}):
        for pool in pools:
            first, _, third = (pool.try_allocate(8) for _ in range(3))
            pool.free(first or ())
            pool.free(third or ())
        tensors = {"l.k_proj": pair(5, 20), "l.o_proj": pair(rank, 131)}
        for pool in pools:
            for group in pool.groups:
                for rows in (group.a, *group.b):
                    rows.fill_(7)  # of whoever was there before
            pages = pool.try_allocate(pool.num_rows(rank, has_columns=columns is not None))
            assert pages is not None
            pool.write(pages, rank, tensors, columns)
        for one, other in zip(*(pool.groups for pool in pools), strict=True):
            for x, y in zip((one.a, *one.b), (other.a, *other.b), strict=True):
                assert torch.equal(x.view(BITS[dtype]), y.view(BITS[dtype]))


def test_squares_are_those_of_numpy(kernels: native.NativeKernels, tmp_path: Path) -> None:
    """Any dtype, any length, from any byte on; NaN and infinity show wherever they are."""
    rng = np.random.default_rng(0)
    arrays = [
        (rng.standard_normal(size) * 10.0**power).astype(np.float32)
        for size in (1, 15, 16, 4095, 4097, 70_001)
        for power in (-10, 0, 10)
    ]
    bad = [rng.standard_normal(5000).astype(np.float32) for _ in range(4)]
    for array, place, value in zip(
        bad, (0, 4999, 4096, 17), (math.nan, math.inf, -math.inf, math.nan), strict=True
    ):
        array[place] = value
    data, infos, tensors = b"odd", [], []
    for i, array in enumerate(arrays + bad):
        tensor = torch.from_numpy(array).to(torch.bfloat16 if i % 2 else torch.float32)
        raw = tensor.view(torch.uint8).numpy().tobytes()
        name = "BF16" if i % 2 else "F32"
        start = len(data)
        infos.append(
            TensorInfo(
                name=str(i), dtype=name, shape=tensor.shape, start=start, end=start + len(raw)
            )
        )
        tensors.append(tensor)
        data += raw + b"-"[: i % 2]
    path = tmp_path / "tensors"
    path.write_bytes(data)
    buffer = ReadBuffer()
    for found in (kernels, None):
        file = TensorBytes(found, buffer)
        sums = file.squares(path, infos)
        for info, tensor, total in zip(infos, tensors, sums, strict=True):
            assert file.tensor(info).equal(tensor) or not tensor.isfinite().all()
            expected = float(tensor.double().square().sum())
            if math.isfinite(expected):
                assert total == pytest.approx(expected, rel=1e-6)
            else:
                assert not math.isfinite(total)


def test_a_file_that_has_shrunk_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    path.write_bytes(bytes(40))
    info = TensorInfo(name="a", dtype="F32", shape=(16,), start=0, end=64)
    with pytest.raises(CorruptArtifact, match="ends before"):
        TensorBytes().squares(path, [info])


def test_one_thread_reads_into_the_same_memory_and_others_into_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    buffer = ReadBuffer()
    address = buffer.of(1000).data_ptr()
    assert buffer.of(500).data_ptr() == address
    with ThreadPoolExecutor(1) as worker:
        assert worker.submit(lambda: buffer.of(500).data_ptr()).result() != address


def test_a_pool_keeps_what_follows_from_where_tensors_lie(kernels: native.NativeKernels) -> None:
    group = GroupSpec(modules=("l.q_proj",), in_features=8, out_features=(8,))
    pool = AdapterPool(
        [group],
        memory_bytes=4096,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kernels=kernels,
    )
    a, b = torch.full((8, 8), 1.0), torch.full((8, 8), 1.0)
    adapter = LoadedAdapter(rank=8, tensors={"l.q_proj": (a, b)})
    for value in (1.0, 2.0):
        a.fill_(value)
        pages = pool.try_allocate(8)
        assert pages is not None
        entry = pool.write(pages, 8, adapter.tensors, of=adapter)
        assert set(pool.groups[0].a[0][list(entry.rows)].flatten().tolist()) == {value}
    assert len(pool._parts) == 1
    del adapter
    assert len(pool._parts) == 0
