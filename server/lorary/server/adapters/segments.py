"""Which rows of a step belong to which adapter: computed once per step, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lorary.server.adapters.tiles import RowTiles, Tiling

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_COLUMNS = -1


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """Where an adapter lies in the pool.

    ``rows`` are pool row numbers, one per rank row, and ``scales`` has one factor per rank row, so
    that a weighted sum of adapters is just a longer list. Versions are canonical: their own scale
    is already folded into B, so a single adapter has scales of 1. ``error`` is the largest relative
    error of a module's B·A that the pool's storage has brought; 0 where it keeps what is multiplied.
    ``columns`` is where DoRA's column scales lie (a row of ``GroupPool.columns``), else ``NO_COLUMNS``.
    In layers before ``first_layer`` it adds zeros to the base's outputs, so that they stay as they are; 0
    says nothing of any layer.
    """

    rows: tuple[int, ...]
    scales: tuple[float, ...]
    error: float = 0.0
    columns: int = NO_COLUMNS
    first_layer: int = 0

    @property
    def rank(self) -> int:
        """Number of rank rows."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of one step that share an adapter and are treated as one matrix product.

    Attributes:
        entry: index into ``Segments.entries``.
        start: first row, when the rows are neighbours; else -1 and ``rows`` tells.
        length: number of rows.
        rows: int64 [length], row numbers.
        pool_rows: int64 [rank], pool rows of the adapter.
        is_contiguous: whether ``pool_rows`` are neighbours in the pool, ascending.
        scales: float32 [rank], or None when all are 1.
        columns: the entry's.
    """

    entry: int
    start: int
    length: int
    rows: torch.Tensor
    pool_rows: torch.Tensor
    is_contiguous: bool
    scales: torch.Tensor | None
    columns: int = NO_COLUMNS


@dataclass(frozen=True)
class Segments:
    """A step's rows by adapter.

    Rows of ``long`` segments (prefill) go through one product per segment; the ``short`` rows
    (decode: many adapters, few rows each) go through the row-wise kernel in one call. Every row
    with an adapter is in exactly one of the two.

    Attributes:
        entries: the step's distinct adapters.
        adapter_of_row: index into ``entries`` per row, -1 for the bare base.
        long: segments to multiply one by one.
        short_rows: int32 [S], rows of the short part, sorted by adapter.
        short_entry: int32 [S], index into ``entries`` of each.
        rank_indptr: int32 [K + 1], where each entry's rank rows begin in ``rank_rows``.
        rank_rows: int32 [sum of ranks], pool rows.
        rank_scales: float32 [sum of ranks].
        columns: int32 [K], each entry's; None when no entry has column scales.
        device: where the rows are.
    """

    entries: tuple[PoolEntry, ...]
    adapter_of_row: tuple[int, ...]
    long: tuple[Segment, ...]
    short_rows: torch.Tensor
    short_entry: torch.Tensor
    rank_indptr: torch.Tensor
    rank_rows: torch.Tensor
    rank_scales: torch.Tensor
    columns: torch.Tensor | None
    device: torch.device

    @cached_property
    def tiling(self) -> Tiling:
        """Return the short part cut into tiles, on the host."""
        return Tiling.cut(self.short_entry.tolist(), self.entries, self.short_rows.tolist())

    @cached_property
    def tiles(self) -> RowTiles:
        """Return the short part as the GPU kernels want it; made when first asked for."""
        return self.tiling.on(self.tiling.flat().to(self.device))

    @property
    def has_tiles(self) -> bool:
        """Whether ``tiles`` are on the device already, from a step before."""
        return "tiles" in self.__dict__

    def place(self, flat: torch.Tensor) -> None:
        """Take ``tiles`` from what has been copied to the device of ``tiling.flat``."""
        self.__dict__["tiles"] = self.tiling.on(flat)

    @property
    def num_short(self) -> int:
        """How many rows the row-wise kernel handles."""
        return self.short_rows.numel()

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the short part's arrays lie, in the order of the native ``Mix``; then its length."""
        arrays = (
            self.short_rows,
            self.short_entry,
            self.rank_indptr,
            self.rank_rows,
            self.rank_scales,
        )
        columns = 0 if self.columns is None else self.columns.data_ptr()
        return (*(array.data_ptr() for array in arrays), columns, self.num_short)

    @classmethod
    def of_tiles(cls, tiles: RowTiles) -> Segments:
        """Return what only the kernels that walk over tiles can read: all of it is on the device."""
        nothing = tiles.rows[:0]
        found = cls(
            entries=(),
            adapter_of_row=(),
            long=(),
            short_rows=tiles.rows,
            short_entry=nothing,
            rank_indptr=nothing,
            rank_rows=tiles.rank_rows,
            rank_scales=tiles.rank_scales,
            columns=None,
            device=tiles.rows.device,
        )
        found.__dict__["tiles"] = tiles
        return found

    @classmethod
    def build(
        cls,
        row_entries: Sequence[PoolEntry | None],
        *,
        device: torch.device,
        long_from: int,
    ) -> Segments | None:
        """Group rows by adapter.

        Args:
            row_entries: the adapter of every row, or None; equal objects are one adapter.
            device: where the rows are, and so the index tensors of long segments.
            long_from: an adapter with at least this many rows becomes a long segment.

        Returns:
            The segments, or None when no row has an adapter: the layers then skip everything.
        """
        rows_of: dict[int, list[int]] = {}
        entries: list[PoolEntry] = []
        index_of: dict[int, int] = {}
        adapter_of_row = [-1] * len(row_entries)
        for row, entry in enumerate(row_entries):
            if entry is None:
                continue
            index = index_of.get(id(entry))
            if index is None:
                index = index_of[id(entry)] = len(entries)
                entries.append(entry)
                rows_of[index] = []
            rows_of[index].append(row)
            adapter_of_row[row] = index
        if not entries:
            return None
        long: list[Segment] = []
        short_rows: list[int] = []
        short_entry: list[int] = []
        for index, rows in rows_of.items():
            if len(rows) >= long_from:
                long.append(_segment(index, entries[index], rows, device))
            else:
                short_rows += rows
                short_entry += [index] * len(rows)
        indptr = [0]
        rank_rows: list[int] = []
        rank_scales: list[float] = []
        for entry in entries:
            rank_rows += entry.rows
            rank_scales += entry.scales
            indptr.append(len(rank_rows))
        columns = [entry.columns for entry in entries]
        has_columns = any(at != NO_COLUMNS for at in columns)
        return cls(
            entries=tuple(entries),
            adapter_of_row=tuple(adapter_of_row),
            long=tuple(long),
            short_rows=torch.tensor(short_rows, dtype=torch.int32),
            short_entry=torch.tensor(short_entry, dtype=torch.int32),
            rank_indptr=torch.tensor(indptr, dtype=torch.int32),
            rank_rows=torch.tensor(rank_rows, dtype=torch.int32),
            rank_scales=torch.tensor(rank_scales, dtype=torch.float32),
            columns=torch.tensor(columns, dtype=torch.int32) if has_columns else None,
            device=device,
        )


def _segment(index: int, entry: PoolEntry, rows: list[int], device: torch.device) -> Segment:
    is_run = rows[-1] - rows[0] + 1 == len(rows)
    first = entry.rows[0]
    plain = all(scale == 1.0 for scale in entry.scales)
    return Segment(
        entry=index,
        start=rows[0] if is_run else -1,
        length=len(rows),
        rows=torch.tensor(rows, device=device),
        pool_rows=torch.tensor(entry.rows, device=device),
        is_contiguous=entry.rows == tuple(range(first, first + entry.rank)),
        scales=None if plain else torch.tensor(entry.scales, device=device),
        columns=entry.columns,
    )
