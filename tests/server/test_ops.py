"""Every implementation of the mixed-adapter product equals the reference."""

from __future__ import annotations

import pytest
import torch

from lorary.server.adapters.ops import torch_ops
from lorary.server.adapters.segments import NO_COLUMNS, PoolEntry, Segments
from lorary.server.native import library as native
from tests.server.ops_cases import WIDTH, Case, entries

CPU = torch.device("cpu")
CAPACITY = 256


def popularity(name: str, rows: int, num_adapters: int) -> list[int]:
    if name == "distinct":
        return [i % num_adapters for i in range(rows)]
    if name == "identical":
        return [0] * rows
    if name == "skewed":
        return [0 if i % 3 else i % num_adapters for i in range(rows)]
    return torch.randint(
        -1, num_adapters, (rows,), generator=torch.Generator().manual_seed(0)
    ).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [[1, 3, 8], [16] * 4, [64, 1, 33], [128]])
@pytest.mark.parametrize("kind", ["distinct", "uniform", "skewed", "identical"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_product_equals_the_reference(
    implementation: str, rows: int, kind: str, ranks: list[int], dtype: torch.dtype
) -> None:
    pool = entries(ranks, CAPACITY)
    chosen = popularity(kind, rows, len(pool))
    row_entries = [pool[i] if i >= 0 else None for i in chosen]
    case = Case.random(row_entries, capacity=CAPACITY, dtype=dtype)
    segments = case.segments(long_from=1 if implementation == "torch" else rows + 1)
    if segments is None:
        assert all(e is None for e in row_entries)
        return
    actual = case.y.clone()
    if implementation == "native":
        kernel = native.load()
        assert not isinstance(kernel, str), kernel
        kernel.bind(case.a, case.b).add_rows(actual, case.x, segments)
    else:
        for segment in segments.long:
            torch_ops.add_segment(actual, case.x, case.a, case.b, segment)
    case.check(actual, segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_product_with_rows_kept_in_fewer_bits(
    implementation: str, rows: int, storage: torch.dtype, dtype: torch.dtype
) -> None:
    """Rounding aside nothing is lost: equal to the reference with the rounded numbers."""
    pool = entries([5, 16, 33], CAPACITY)
    pool.append(PoolEntry(tuple(range(200, 212)), (1.0,) * 12))
    row_entries = [pool[i] if i >= 0 else None for i in popularity("uniform", rows, 4)]
    case = Case.random(row_entries, capacity=CAPACITY, dtype=dtype, storage=storage)
    segments = case.segments(long_from=1 if implementation == "torch" else rows + 1)
    assert segments is not None
    actual = case.y.clone()
    if implementation == "native":
        kernel = native.load()
        assert not isinstance(kernel, str), kernel
        assert kernel.supports_storage(storage) == (storage != torch.float8_e4m3fn)
        if storage == torch.float8_e4m3fn:
            return
        kernel.bind(case.a, case.b, case.row_scales, dtype).add_rows(actual, case.x, segments)
    else:
        for segment in segments.long:
            torch_ops.add_segment(actual, case.x, case.a, case.b, segment, case.row_scales)
    case.check(actual, segments)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("storage", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_column_scales_change_the_rows_of_their_adapter_alone(
    implementation: str, dtype: torch.dtype, storage: torch.dtype | None, has_bias: bool
) -> None:
    """DoRA: equal to the reference; every other row has the bits of a step without it."""
    case = Case.with_columns(
        dtype=dtype, outs=(48, 20, 16), device="cpu", storage=storage, has_bias=has_bias
    )

    def add(case: Case) -> tuple[torch.Tensor, Segments]:
        segments = case.segments(long_from=1 if implementation == "torch" else 99)
        assert segments is not None
        y = case.y.clone()
        if implementation == "native":
            kernel = native.load()
            assert not isinstance(kernel, str), kernel
            bound = kernel.bind(case.a, case.b, case.row_scales, dtype, case.bias)
            bound.add_rows(y, case.x, segments)
        for segment in segments.long:
            torch_ops.add_segment(
                y, case.x, case.a, case.b, segment, case.row_scales, case.columns, case.bias
            )
        return y, segments

    actual, segments = add(case)
    case.check(actual, segments)
    alone, _ = add(case.without_columns())
    for row, entry in enumerate(case.row_entries):
        has_columns = entry is not None and entry.columns != NO_COLUMNS
        assert torch.equal(actual[row], alone[row]) != has_columns


def test_native_row_does_not_depend_on_its_company() -> None:
    """The same row gives the same bits alone, in a crowd, and at another place."""
    kernel = native.load()
    assert not isinstance(kernel, str), kernel
    a = torch.randn(1, 64, WIDTH)
    b = [torch.randn(64, 32)]
    pool = [PoolEntry(tuple(range(i, i + 9)), (1.0,) * 9) for i in range(0, 45, 9)]
    x, y = torch.randn(11, WIDTH), torch.randn(11, 32)
    bound = kernel.bind(a, b)
    crowd = y.clone()
    everyone = Segments.build([pool[i % 5] for i in range(11)], device=CPU, long_from=99)
    assert everyone is not None
    bound.add_rows(crowd, x, everyone)
    for row in range(11):
        alone = y[row : row + 1].clone()
        single = Segments.build([pool[row % 5]], device=CPU, long_from=99)
        assert single is not None
        bound.add_rows(alone, x[row : row + 1].contiguous(), single)
        assert torch.equal(alone[0], crowd[row])


def test_segments_cover_every_adapter_row_once() -> None:
    pool = entries([4, 4, 4], CAPACITY)
    rows = [None, pool[0], pool[1], pool[0], pool[0], None, pool[2]]
    segments = Segments.build(rows, device=CPU, long_from=3)
    assert segments is not None
    covered = sorted(
        [r for s in segments.long for r in s.rows.tolist()] + segments.short_rows.tolist()
    )
    assert covered == [1, 2, 3, 4, 6]
    assert [s.length for s in segments.long] == [3]
    assert segments.adapter_of_row == (-1, 0, 1, 0, 0, -1, 2)


def test_no_adapter_means_no_segments() -> None:
    assert Segments.build([None, None], device=CPU, long_from=1) is None


def test_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Without a compiler the reason comes back, so that the server can say why it is slower."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LORARY_HOME", str(tmp_path))
    reason = native.load.__wrapped__()
    assert isinstance(reason, str)
    assert "C++ compiler" in reason
