"""A step's rows in tiles of one adapter each, on the device: what the GPU kernels walk over.

Every number that changes from step to step is in device memory and a tile may be empty, so a
launch depends on how many tiles there are and on nothing else of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorary.server.adapters.segments import PoolEntry

TILE_ROWS = 16
"""Rows of one tile: the smallest side of a matrix product that tensor cores take."""
TILE_FIELDS = 6


@dataclass(frozen=True, slots=True)
class RowTiles:
    """Rows by adapter, at most ``TILE_ROWS`` to a tile; rows of the bare base are in none.

    The rank rows' sums of a tile lie together, ``rows x rank`` of them: no row is padded to another
    adapter's rank.

    Attributes:
        tiles: int32 [num_tiles, 6]: where in ``rows`` a tile begins, how many rows it has (0: the
            tile is empty), where in ``rank_rows`` its adapter begins, that adapter's rank, where its
            sums begin, and that adapter's ``columns``.
        rows: int32 [S], row numbers, sorted by adapter.
        rank_rows: int32 [sum of ranks], pool rows.
        rank_scales: float32 [sum of ranks].
        num_tiles: how many tiles a launch goes through, the empty ones included.
        num_sums: how many sums there are room for, per member of a group.
        max_rank: the largest rank.
    """

    tiles: torch.Tensor
    rows: torch.Tensor
    rank_rows: torch.Tensor
    rank_scales: torch.Tensor
    num_tiles: int
    num_sums: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class Tiling:
    """``RowTiles`` on the host, as plain numbers.

    Attributes:
        tiles: ``TILE_FIELDS`` numbers for each tile.
        rows: likewise of ``RowTiles``, as are the others.
    """

    tiles: list[int]
    rows: list[int]
    rank_rows: list[int]
    rank_scales: list[float]
    num_sums: int
    max_rank: int

    @property
    def num_tiles(self) -> int:
        """How many tiles there are."""
        return len(self.tiles) // TILE_FIELDS

    @classmethod
    def cut(
        cls, row_entries: Sequence[int], entries: Sequence[PoolEntry], rows: Sequence[int]
    ) -> Tiling:
        """Cut rows into tiles.

        Args:
            row_entries: of every listed row, the index of its adapter in ``entries``; equal ones are
                neighbours.
            entries: the adapters.
            rows: row numbers.
        """
        first_rank, ranks = [], 0
        for entry in entries:
            first_rank.append(ranks)
            ranks += entry.rank
        tiles: list[int] = []
        sums = start = 0
        for stop in range(1, len(rows) + 1):
            is_end = stop == len(rows) or row_entries[stop] != row_entries[start]
            if is_end or stop - start == TILE_ROWS:
                index = row_entries[start]
                rank = entries[index].rank
                columns = entries[index].columns
                tiles += [start, stop - start, first_rank[index], rank, sums, columns]
                sums += (stop - start) * rank
                start = stop
        return cls(
            tiles=tiles,
            rows=list(rows),
            rank_rows=[r for e in entries for r in e.rows],
            rank_scales=[s for e in entries for s in e.scales],
            num_sums=sums,
            max_rank=max(entries[index].rank for index in row_entries),
        )

    def flat(self) -> torch.Tensor:
        """Return all of it as one int32 tensor on the host, scales by their bits."""
        numbers = torch.tensor([*self.tiles, *self.rows, *self.rank_rows], dtype=torch.int32)
        scales = torch.tensor(self.rank_scales, dtype=torch.float32).view(torch.int32)
        return torch.cat([numbers, scales])

    def on(self, flat: torch.Tensor) -> RowTiles:
        """Return the tiles that lie in ``flat``, wherever it is now."""
        ranks = len(self.rank_rows)
        there = torch.split(flat, [len(self.tiles), len(self.rows), ranks, ranks])
        return RowTiles(
            tiles=there[0].view(self.num_tiles, TILE_FIELDS),
            rows=there[1],
            rank_rows=there[2],
            rank_scales=there[3].view(torch.float32),
            num_tiles=self.num_tiles,
            num_sums=self.num_sums,
            max_rank=self.max_rank,
        )
