"""Times of single kernels: copies of memory, the two halves of the adapters' product, and torch's bmm."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from lorary.server.adapters.ops import triton_ops
from lorary.server.adapters.segments import PoolEntry, Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MORE_THAN_CACHED = 128 << 20
"""Bytes of adapters that are gone through in turn, so that none is still in the cache."""
_MOST_COPIES = 64
_REPLAYS = 20
PATTERNS: dict[str, Callable[[int, int], int]] = {
    # Which of ``adapters`` a row has; -1 is the bare base.
    "distinct": lambda row, adapters: row % adapters,
    "one": lambda _row, _adapters: 0,
    # Half of the rows have one adapter, a quarter another, and so on.
    "skewed": lambda row, adapters: min((row + 1).bit_length() - 1, adapters - 1),
    "base between": lambda row, adapters: row // 2 % adapters if row % 2 else -1,
}


def copy_rate(device: str, num_bytes: int) -> float:
    """Return bytes a second of copies on the device, those read and those written counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of([lambda: target.copy_(source)], device)


def seconds_of(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Return the mean seconds of a call, of calls made one after the other.

    On a GPU they are captured as one graph and replayed, so that what Python needs to launch them is
    not in the figure; medians of the replays.
    """
    for call in calls:
        call()
    if not device.startswith("cuda"):
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(_REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    # The first one uploads the graph.
    return float(sorted(times[1:])[_REPLAYS // 2]) / len(calls)


class GroupCase:
    """One group of layers, its pool of adapters of one rank, several times over.

    Args:
        width: of the group's input.
        outs: of its members.
        rank: of every adapter.
        adapters: how many there are.
        rows: of a step.
        pattern: of ``PATTERNS``.
        dtype: of all but the sums.
        device: where.
    """

    def __init__(
        self,
        width: int,
        outs: tuple[int, ...],
        *,
        rank: int,
        adapters: int,
        rows: int,
        pattern: str,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        kernels = triton_ops.load()
        if isinstance(kernels, str):
            raise TypeError(f"{kernels}; on a CPU set TRITON_INTERPRET=1")
        self._device = device
        generator = torch.Generator(device).manual_seed(rank)

        def draw(*size: int) -> torch.Tensor:
            made = torch.empty(size, dtype=dtype, device=device)
            return made.normal_(0, 0.05, generator=generator)

        chosen = [PATTERNS[pattern](row, adapters) for row in range(rows)]
        entries = [
            PoolEntry(rows=tuple(range(k * rank, (k + 1) * rank)), scales=(1.0,) * rank)
            for k in range(adapters)
        ]
        segments = Segments.build(
            [entries[k] if k >= 0 else None for k in chosen],
            device=torch.device(device),
            long_from=rows + 1,
        )
        assert segments is not None, "every pattern has a row with an adapter"
        used = len(set(chosen) - {-1})
        self.num_bytes = used * rank * (len(outs) * width + sum(outs)) * dtype.itemsize
        copies = min(_MOST_COPIES, -(-_MORE_THAN_CACHED // self.num_bytes))
        if not device.startswith("cuda"):
            copies = 1
        capacity = adapters * rank
        pools = [
            (draw(len(outs), capacity, width), [draw(capacity, out) for out in outs])
            for _ in range(copies)
        ]
        self._bound = [kernels.bind(a, b) for a, b in pools]
        self._tiles = segments.tiles
        self._x, self._y = draw(rows, width), draw(rows, sum(outs))
        self._outs = outs
        # Each row's own A and B, gathered beforehand: what a product that knows no adapters takes.
        index = torch.tensor([k for k in chosen if k >= 0], device=device)
        ranks = torch.arange(rank, device=device)
        at = (index[:, None] * rank + ranks).view(-1)
        self._rows = torch.tensor([i for i, k in enumerate(chosen) if k >= 0], device=device)
        shape = (len(index), rank, -1)
        self._stacked = [
            ([m[at].view(shape) for m in a], [m[at].view(shape) for m in b]) for a, b in pools
        ]

    def measure(self) -> dict[str, float]:
        """Return microseconds: of the halves, of both, and of bmm over each row's own copy."""
        sums = [bound.shrink_rows(self._x, self._tiles) for bound in self._bound]
        halves = list(zip(self._bound, sums, strict=True))
        calls: dict[str, list[Callable[[], Any]]] = {
            "shrink_us": [
                lambda bound=bound: bound.shrink_rows(self._x, self._tiles)  # type: ignore[misc]
                for bound, _ in halves
            ],
            "expand_us": [
                lambda bound=bound, t=t: bound.expand_rows(self._y, t, self._tiles)  # type: ignore[misc]
                for bound, t in halves
            ],
            "both_us": [lambda bound=bound: self._both(bound) for bound, _ in halves],  # type: ignore[misc]
            "bmm_us": [lambda own=own: self._bmm(*own) for own in self._stacked],  # type: ignore[misc]
        }
        return {
            name: round(1e6 * seconds_of(made, self._device), 3) for name, made in calls.items()
        }

    def check(self) -> float:
        """Return the largest difference between the kernels' sum and bmm's, over the largest of bmm's."""
        self._y.zero_()
        self._both(self._bound[0])
        ours = self._y.float()
        self._y.zero_()
        self._bmm(*self._stacked[0])
        theirs = self._y.float()
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def _both(self, bound: triton_ops.TritonPool) -> None:
        bound.expand_rows(self._y, bound.shrink_rows(self._x, self._tiles), self._tiles)

    def _bmm(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        x = self._x[self._rows][:, :, None]
        parts = []
        for member_a, member_b in zip(a, b, strict=True):
            t = torch.bmm(member_a, x)
            parts.append(torch.bmm(t.transpose(1, 2), member_b)[:, 0])
        self._y.index_add_(0, self._rows, torch.cat(parts, dim=1))
