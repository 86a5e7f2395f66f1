"""An adapter's rows as they lie in the pool, in one piece of host memory: bringing it back is a copy.

Made from the pool's own pages, so it has their very bits, rounding and scales included; nothing of it is
checked, parsed or rounded again. Pinned where the pool is on a GPU, so that the copy back needs no third one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lorary.server.adapters.segments import NO_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.adapters.pool import AdapterPool, GroupPool
    from lorary.server.adapters.segments import PoolEntry

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class _GroupRows:
    """One group's rows, views of the copy's buffer: rank rows, then those of the column scales.

    Shapes: a [members, R, in], b members × [R, out], in the pool's storage; scales float32 [members, R].
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    scales: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class HostCopy:
    """One adapter in host memory.

    Attributes:
        rank: its rank rows.
        has_columns: whether DoRA's column scales are behind them.
        error: of its entry: what the pool's storage has brought.
        first_layer: likewise.
        num_bytes: what it takes, with what the allocator adds.
        groups: its rows.
    """

    rank: int
    has_columns: bool
    error: float
    first_layer: int
    num_bytes: int
    groups: tuple[_GroupRows, ...]


def copy_bytes(pool: AdapterPool, entry: PoolEntry) -> int:
    """Return the bytes that the copy of an adapter takes."""
    count = len(pool.rows_of(entry))
    size = sum(_aligned(nbytes) for group in pool.groups for nbytes in _sizes(group, count))
    # torch hands out pinned memory in powers of two.
    return 1 << (size - 1).bit_length() if pool.device.type == "cuda" else size


def copy_out(pool: AdapterPool, entry: PoolEntry) -> HostCopy:
    """Copy an adapter's rows from the pool; nobody may write its pages meanwhile."""
    rows = _Rows(pool.rows_of(entry), pool.device)
    count = len(rows.numbers)
    size = sum(_aligned(nbytes) for group in pool.groups for nbytes in _sizes(group, count))
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pool.device.type == "cuda")
    offset = 0
    groups = []
    for group in pool.groups:
        views = []
        for source, dim in _tensors(group):
            shape = list(source.shape)
            shape[dim] = count
            view = _carve(buffer, offset, shape, source.dtype)
            offset += _aligned(view.nbytes)
            view.copy_(rows.of(source, dim), non_blocking=True)
            views.append(view)
        has_scales = group.row_scales is not None
        b = tuple(views[1:-1] if has_scales else views[1:])
        groups.append(_GroupRows(views[0], b, views[-1] if has_scales else None))
    return HostCopy(
        entry.rank,
        entry.columns != NO_COLUMNS,
        entry.error,
        entry.first_layer,
        copy_bytes(pool, entry),
        tuple(groups),
    )


def copy_in(pool: AdapterPool, pages: Sequence[int], copy: HostCopy) -> PoolEntry:
    """Copy an adapter's rows into pages of the same pool, taken for its ``num_rows``."""
    entry = pool.place(pages, copy.rank, has_columns=copy.has_columns)
    rows = _Rows(pool.rows_of(entry), pool.device)
    for group, kept in zip(pool.groups, copy.groups, strict=True):
        views = [kept.a, *kept.b, *([] if kept.scales is None else [kept.scales])]
        for (target, dim), view in zip(_tensors(group), views, strict=True):
            rows.put(target, dim, view)
    return replace(entry, error=copy.error, first_layer=copy.first_layer)


class _Rows:
    """Row numbers of the pool: a slice when they are neighbours, an index when not."""

    def __init__(self, numbers: tuple[int, ...], device: torch.device) -> None:
        self.numbers = numbers
        first = numbers[0]
        self._first = first if numbers == tuple(range(first, first + len(numbers))) else -1
        self._index = torch.tensor(numbers, device=device) if self._first < 0 else None

    def of(self, source: torch.Tensor, dim: int) -> torch.Tensor:
        if self._index is None:
            return source.narrow(dim, self._first, len(self.numbers))
        return _raw(source).index_select(dim, self._index).view(source.dtype)

    def put(self, target: torch.Tensor, dim: int, rows: torch.Tensor) -> None:
        if self._index is None:
            target.narrow(dim, self._first, len(self.numbers)).copy_(rows, non_blocking=True)
        else:
            there = _raw(rows).to(target.device, non_blocking=True)
            _raw(target).index_copy_(dim, self._index, there)


def _tensors(group: GroupPool) -> list[tuple[torch.Tensor, int]]:
    """Return what holds a group's rows, each with the dimension that counts them."""
    found = [(group.a, 1), *((b, 0) for b in group.b)]
    return found if group.row_scales is None else [*found, (group.row_scales, 1)]


def _sizes(group: GroupPool, num_rows: int) -> list[int]:
    return [t.nbytes // t.shape[dim] * num_rows for t, dim in _tensors(group)]


def _carve(buffer: torch.Tensor, offset: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return buffer[offset : offset + num_bytes].view(dtype).view(shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def _raw(rows: torch.Tensor) -> torch.Tensor:
    """Return 8-bit floats as bytes, for torch copies few kinds of them by index."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
