"""All resident A's and B's, in pages of rank rows.

Every group of layers that share an input (q/k/v; gate/up; o; down) has one pool: A rows
``[members, capacity, in]`` and, per member, B rows ``[capacity, out]`` (B transposed, so that a rank
row is contiguous in both). An adapter is a list of pages, the same pages in every group, so mixed
ranks cost their true rank rounded up to a page, and the budget is bytes, not a count. Rows may be
kept in fewer bits than they are multiplied in (``rounding``): then A's and B's row are rounded each to
its own range, and only the product of their two scales is kept, for no kernel needs them apart.

DoRA's column scales (``columns``) lie in the pages, too, so that budget, eviction and copies know
nothing of them: behind the rank rows an adapter has one to four further rows, whose bytes in B are read
as float32 [out]. They begin where a float32 may begin and never cross a page.

Ownership of a page: free → written by one loader thread → read by steps → free. The pool hands out
and takes back pages under its lock; that nobody reads a page while it is written is the
residency's affair (an entry is published after it is written, freed after its last reader).
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from lorary.errors import ConfigError
from lorary.server.adapters.rounding import has_scales, product_error, round_rows
from lorary.server.adapters.segments import NO_COLUMNS, PoolEntry
from lorary.server.lazy_memory import lazy_zeros
from lorary.server.native.library import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorary.server.native.library import NativeKernels

PAGE_ROWS = {"cpu": 8, "cuda": 16}


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group of linear layers that read the same input.

    Attributes:
        modules: full module names, in the order in which their outputs are laid side by side.
        in_features: width of the shared input.
        out_features: width of each member's output.
        layer: the decoder layer that it is in; 0 for what is in none, too.
    """

    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    layer: int = 0

    @property
    def row_elements(self) -> int:
        """Elements that one rank row takes in this group."""
        return len(self.modules) * self.in_features + sum(self.out_features)


class GroupPool:
    """The rows of one group.

    Attributes:
        spec: the group.
        dtype: what the rows are multiplied in.
        a: [members, capacity, in], in the storage's dtype.
        b: members × [capacity, out], likewise.
        row_scales: float32 [members, capacity], what a product with a row of A and that of B is
            multiplied by; None where the storage needs no scales.
        columns: members × float32 [capacity / column_rows, out], the memory of ``b`` seen as column
            scales.
    """

    def __init__(
        self,
        spec: GroupSpec,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: torch.dtype | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        storage = storage or dtype
        # Zeroed, for a module that an adapter leaves alone keeps rows of zeros.
        self.a = lazy_zeros((len(spec.modules), capacity, spec.in_features), storage, device)
        self.b = tuple(lazy_zeros((capacity, out), storage, device) for out in spec.out_features)
        self.row_scales = (
            torch.zeros(len(spec.modules), capacity, device=device) if has_scales(storage) else None
        )
        self.columns = tuple(
            _raw(b).view(-1).view(torch.float32).view(-1, b.shape[1]) for b in self.b
        )

    def clear(self, member: int, index: torch.Tensor) -> None:
        """Make rows of one member zeros; index int64 [R]."""
        _raw(self.a[member]).index_fill_(0, index, 0)
        _raw(self.b[member]).index_fill_(0, index, 0)
        if self.row_scales is not None:
            self.row_scales[member].index_fill_(0, index, 0)

    def put(self, member: int, index: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
        """Write rows of one member; return the relative error of B·A through rounding.

        Shapes: index int64 [R], a [R, in], b [R, out], on the pool's device.
        """
        storage = self.a.dtype
        if a.dtype == storage == b.dtype:
            kept_a, kept_b, error = a, b, 0.0
        else:
            a, b = a.float(), b.float()
            kept_a, scale_a = round_rows(a, storage)
            kept_b, scale_b = round_rows(b, storage)
            back_a, back_b = kept_a.float(), kept_b.float()
            if scale_a is not None and scale_b is not None:
                assert self.row_scales is not None
                self.row_scales[member].index_copy_(0, index, scale_a * scale_b)
                back_a, back_b = back_a * scale_a[:, None], back_b * scale_b[:, None]
            error = product_error(a, b, back_a, back_b)
        _raw(self.a[member]).index_copy_(0, index, _raw(kept_a))
        _raw(self.b[member]).index_copy_(0, index, _raw(kept_b))
        return error


def _is_laid(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether the kernel takes a module's A and B as they are."""
    a, b = pair
    is_known = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float32)
    return is_known and a.is_contiguous() and b.is_contiguous()


def _raw(rows: torch.Tensor) -> torch.Tensor:
    """Return 8-bit floats as bytes, for torch copies few kinds of them by index."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


class AdapterPool:
    """Pages of rank rows for every group, within a byte budget.

    Args:
        groups: what is changed by adapters.
        memory_bytes: for all pages, scales included.
        dtype: what rows are multiplied in.
        device: where they lie.
        storage: what they are kept in; None for ``dtype``.
        kernels: lay rows into pages, where they are not rounded by a scale and lie in the CPU's memory.

    Raises:
        ConfigError: the budget does not hold one page.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        *,
        memory_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: torch.dtype | None = None,
        kernels: NativeKernels | None = None,
    ) -> None:
        storage = storage or dtype
        self.page_rows = PAGE_ROWS.get(device.type, 16)
        self.column_rows = max(1, torch.float32.itemsize // storage.itemsize)
        scale_bytes = 4 if has_scales(storage) else 0
        self.row_bytes = sum(
            storage.itemsize * g.row_elements + scale_bytes * len(g.modules) for g in groups
        )
        self.num_pages = memory_bytes // (self.row_bytes * self.page_rows)
        if self.num_pages < 1:
            raise ConfigError(
                f"adapter memory of {memory_bytes} bytes holds no adapter; a page of "
                f"{self.page_rows} ranks of this base takes {self.page_bytes} bytes. "
                "Raise --adapter-memory."
            )
        capacity = self.num_pages * self.page_rows
        self.groups = tuple(GroupPool(g, capacity, dtype, device, storage) for g in groups)
        self._layer_of = {module: g.layer for g in groups for module in g.modules}
        self.dtype = dtype
        self.storage = storage
        self.device = device
        self._lock = threading.Lock()
        self._free = list(range(self.num_pages - 1, -1, -1))
        is_plain = storage == dtype and device.type == "cpu"
        self._parts: WeakKeyDictionary[object, ctypes.Array[Part]] = WeakKeyDictionary()
        self._kernels = kernels if is_plain and kernels and kernels.supports(dtype) else None

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all groups."""
        return self.row_bytes * self.page_rows

    @property
    def memory_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages handed out."""
        with self._lock:
            return (self.num_pages - len(self._free)) * self.page_bytes

    def num_rows(self, rank: int, *, has_columns: bool) -> int:
        """Return how many rows an adapter of this rank needs, with column scales or without."""
        if not has_columns:
            return rank
        # Rank rows up to where a float32 may begin; the column scales are the last ``column_rows``.
        return (-(-rank // self.column_rows) + 1) * self.column_rows

    def pages_for(self, num_rows: int) -> int:
        """Return how many pages so many rows take."""
        return -(-num_rows // self.page_rows)

    def try_allocate(self, num_rows: int) -> tuple[int, ...] | None:
        """Take pages for so many rows, lowest numbers first; None when too few are free."""
        count = self.pages_for(num_rows)
        with self._lock:
            if count > len(self._free):
                return None
            # Sorted, so that an adapter's pages are neighbours while the pool is not fragmented:
            # then its A and B are views for matrix products.
            self._free.sort(reverse=True)
            return tuple(self._free.pop() for _ in range(count))

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back; nobody may read them any more."""
        with self._lock:
            self._free.extend(pages)

    def write(
        self,
        pages: Sequence[int],
        rank: int,
        tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        columns: Mapping[str, torch.Tensor] | None = None,
        *,
        of: object | None = None,
    ) -> PoolEntry:
        """Copy an adapter into its pages, and return its place.

        Args:
            pages: what ``try_allocate`` returned for its ``num_rows``; rows that hold nothing of it
                are never read.
            rank: the adapter's largest rank; a module of a smaller rank is padded with zeros.
            tensors: per full module name, A [r, in] and B [out, r], r ≤ rank, scale folded in B.
            columns: DoRA's column scales, per module float32 [out]; a module without any keeps 1.
            of: whose tensors these are: as long as it lives they stay where they are, and what follows
                from that is kept. None for tensors that may move.

        Raises:
            KeyError: a module that no group has; the validator refuses these before.
        """
        entry = self.place(pages, rank, has_columns=columns is not None)
        parts = None if of is None else self._parts.get(of)
        if parts is None:
            foreign = tensors.keys() - self._layer_of.keys()
            if foreign:
                raise KeyError(f"modules {sorted(foreign)[:4]} are in no group of this base")
            if self._kernels is not None and all(map(_is_laid, tensors.values())):
                parts = self._parts_of(tensors)
                if of is not None:
                    self._parts[of] = parts
        if parts is not None:
            assert self._kernels is not None, "parts are for them"
            self._kernels.lay(parts, entry.rows, self.dtype)  # the same bits as ``_put``
            worst = 0.0
        else:
            worst = self._put(entry, rank, tensors)
        if columns is not None:
            for group in self.groups:
                for module, kept in zip(group.spec.modules, group.columns, strict=True):
                    if module in columns:
                        kept[entry.columns].copy_(columns[module])
                    else:
                        kept[entry.columns].fill_(1.0)
        return replace(
            entry, error=worst, first_layer=self._first_layer(tensors) if columns is None else 0
        )

    def _first_layer(self, modules: Iterable[str]) -> int:
        """Return the first layer that a change of these modules touches.

        Not asked for DoRA: its column scales are 1 elsewhere, but rows that have some are added up apart
        in every layer (``native/layer.cpp``), and so perhaps rounded otherwise.
        """
        return min((self._layer_of[module] for module in modules), default=0)

    def _put(
        self, entry: PoolEntry, rank: int, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> float:
        """Write every module by torch operators; return the worst relative error of rounding."""
        index = torch.tensor(entry.rows, device=self.device)
        worst = 0.0
        for group in self.groups:
            for m, module in enumerate(group.spec.modules):
                pair = tensors.get(module)
                if pair is None:
                    group.clear(m, index)
                    continue
                a, b = pair
                error = group.put(m, index, self._padded(a, rank), self._padded(b.t(), rank))
                worst = max(worst, error)
        return worst

    def _parts_of(
        self, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> ctypes.Array[Part]:
        """Return where every module's matrices lie and where they go, for one native call."""
        parts = []
        for group in self.groups:
            width = group.spec.in_features
            for m, (module, out) in enumerate(
                zip(group.spec.modules, group.spec.out_features, strict=True)
            ):
                to = (width, out, group.a[m].data_ptr(), group.b[m].data_ptr())
                if module not in tensors:
                    parts.append(Part(None, None, 0, 0, *to))
                    continue
                a, b = tensors[module]
                is_half = a.dtype == torch.bfloat16
                parts.append(Part(a.data_ptr(), b.data_ptr(), is_half, a.shape[0], *to))
        return (Part * len(parts))(*parts)

    def place(self, pages: Sequence[int], rank: int, *, has_columns: bool) -> PoolEntry:
        """Return where an adapter of this rank lies in pages that were taken for its ``num_rows``."""
        numbers = tuple(p * self.page_rows + i for p in pages for i in range(self.page_rows))
        last = numbers[self.num_rows(rank, has_columns=has_columns) - 1]
        return PoolEntry(
            rows=numbers[:rank],
            scales=(1.0,) * rank,
            columns=last // self.column_rows if has_columns else NO_COLUMNS,
        )

    def rows_of(self, entry: PoolEntry) -> tuple[int, ...]:
        """Return every row that holds something of an adapter: its rank rows, then its column scales'."""
        if entry.columns == NO_COLUMNS:
            return entry.rows
        first = entry.columns * self.column_rows
        return (*entry.rows, *range(first, first + self.column_rows))

    def _padded(self, rows: torch.Tensor, rank: int) -> torch.Tensor:
        rows = rows.to(device=self.device)
        if self.storage == self.dtype:
            rows = rows.to(self.dtype)
        if rows.shape[0] == rank:
            return rows
        return torch.nn.functional.pad(rows, (0, 0, 0, rank - rows.shape[0]))
