"""The adapter pool: pages are never shared, never lost, and true-rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import ConfigError
from lorary.server.adapters.host_copy import copy_bytes, copy_in, copy_out
from lorary.server.adapters.pool import AdapterPool, GroupSpec

GROUPS = [
    GroupSpec(("l.q_proj", "l.k_proj"), 8, (8, 4)),
    GroupSpec(("l.o_proj",), 8, (8,)),
]


def make_pool(pages: int = 6) -> AdapterPool:
    row = 4 * sum(g.row_elements for g in GROUPS)
    return AdapterPool(
        GROUPS, memory_bytes=pages * 8 * row, dtype=torch.float32, device=torch.device("cpu")
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=40))
def test_pages_are_handed_out_once_and_come_back(actions: list[tuple[bool, int]]) -> None:
    pool = make_pool()
    held: list[tuple[int, ...]] = []
    for is_allocate, number in actions:
        if is_allocate:
            pages = pool.try_allocate(number)
            if pages is None:
                free = pool.num_pages - sum(map(len, held))
                assert pool.pages_for(number) > free
            else:
                assert len(pages) == pool.pages_for(number)
                held.append(pages)
        elif held:
            pool.free(held.pop(number % len(held)))
        owned = [p for pages in held for p in pages]
        assert len(owned) == len(set(owned))
        assert pool.used_bytes == len(owned) * pool.page_bytes


def test_write_pads_smaller_modules_and_clears_absent_ones() -> None:
    """A page that held another adapter must not leak into a module that the new one leaves alone."""
    pool = make_pool()
    pages = pool.try_allocate(8)
    assert pages is not None
    ones = {
        module: (torch.ones(8, 8), torch.ones(out, 8))
        for g in GROUPS
        for module, out in zip(g.modules, g.out_features, strict=True)
    }
    pool.write(pages, 8, ones)
    pool.free(pages)
    pages = pool.try_allocate(8)
    assert pages is not None
    a, b = torch.randn(3, 8), torch.randn(4, 3)
    entry = pool.write(pages, 8, {"l.k_proj": (a, b)})
    group = pool.groups[0]
    rows = list(entry.rows)
    assert torch.equal(group.a[1, rows[:3]], a)
    assert torch.equal(group.b[1][rows[:3]], b.t())
    assert group.a[1, rows[3:]].count_nonzero() == 0
    assert group.a[0, rows].count_nonzero() == 0
    assert pool.groups[1].b[0][rows].count_nonzero() == 0


def test_unknown_module_is_refused() -> None:
    pool = make_pool()
    with pytest.raises(KeyError, match="nowhere"):
        pool.write(pool.try_allocate(1) or (), 1, {"nowhere": (torch.ones(1, 8), torch.ones(8, 1))})


def test_budget_below_one_page_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--adapter-memory"):
        AdapterPool(GROUPS, memory_bytes=100, dtype=torch.float32, device=torch.device("cpu"))


WIDE = [
    GroupSpec(("l.q_proj", "l.k_proj"), 256, (256, 64)),
    GroupSpec(("l.o_proj",), 256, (256,)),
]


def wide_pool(memory_bytes: int, storage: torch.dtype | None) -> AdapterPool:
    return AdapterPool(
        WIDE,
        memory_bytes=memory_bytes,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        storage=storage,
    )


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn])
def test_8_bits_hold_twice_as_many_adapters_in_the_same_bytes(storage: torch.dtype) -> None:
    """Less the scales, a hundredth here; counted in the memory that the tensors really take."""
    budget = 1 << 20
    pools = {kept: wide_pool(budget, kept) for kept in (None, storage)}
    held = {}
    for kept, pool in pools.items():
        tensors = [t for g in pool.groups for t in (g.a, *g.b, g.row_scales) if t is not None]
        assert sum(t.nbytes for t in tensors) == pool.memory_bytes <= budget
        held[kept] = 0
        while pool.try_allocate(8) is not None:
            held[kept] += 1
    assert held[storage] >= 1.95 * held[None]


@pytest.mark.parametrize(
    ("storage", "largest_error"), [(torch.int8, 0.012), (torch.float8_e4m3fn, 0.05)]
)
def test_rows_are_rounded_each_to_its_own_range(storage: torch.dtype, largest_error: float) -> None:
    pool = wide_pool(1 << 20, storage)
    generator = torch.Generator().manual_seed(0)
    # Rows of very different sizes: one scale for all would lose the small ones.
    sizes = torch.logspace(-3, 3, 6)
    a = torch.randn(6, 256, generator=generator) * sizes[:, None]
    b = torch.randn(256, 6, generator=generator) / sizes
    a[2] = 0
    pages = pool.try_allocate(6)
    assert pages is not None
    entry = pool.write(pages, 6, {"l.o_proj": (a, b)})
    group, rows = pool.groups[1], list(entry.rows)
    assert group.row_scales is not None
    kept_a, kept_b = group.a[0].float()[rows], group.b[0].float()[rows]
    product = kept_b.t() @ (kept_a * group.row_scales[0, rows][:, None])
    error = float((product - b @ a).norm() / (b @ a).norm())
    assert entry.error == pytest.approx(error, rel=0.02)
    assert 0 < error < largest_error
    assert product.isfinite().all()
    # What the next adapter leaves alone is zeros again, scales included.
    pool.write(pages, 6, {})
    assert group.row_scales[0, rows].count_nonzero() == 0
    assert group.a[0].float()[rows].count_nonzero() == 0


@pytest.mark.parametrize("storage", [torch.float32, None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rank", [1, 4, 7, 8, 15, 17])
def test_column_scales_lie_in_the_adapters_own_pages(
    storage: torch.dtype | None, rank: int
) -> None:
    """Of any kept dtype, over scattered pages, through host memory and back: every float32 bit."""
    pool = wide_pool(1 << 20, storage)
    num_rows = pool.num_rows(rank, has_columns=True)
    # Every other page is somebody else's, so that an adapter's pages are no neighbours.
    taken = [pool.try_allocate(1) or () for _ in range(12)]
    for freed in taken[::2]:
        pool.free(freed)
    pages = pool.try_allocate(num_rows)
    assert pages is not None
    assert len(pages) == -(-num_rows // pool.page_rows)
    generator = torch.Generator().manual_seed(rank)
    pair = (torch.randn(rank, 256, generator=generator), torch.randn(64, rank, generator=generator))
    columns = {"l.k_proj": torch.rand(64, generator=generator) + 0.5}
    before = [b.view(torch.uint8).clone() for g in pool.groups for b in g.b]
    entry = pool.write(pages, rank, {"l.k_proj": pair}, columns)
    rows = pool.rows_of(entry)
    assert len(set(rows)) == len(rows) == rank + pool.column_rows
    assert {row // pool.page_rows for row in rows} <= set(pages)
    after = [b.view(torch.uint8) for g in pool.groups for b in g.b]
    for old, new in zip(before, after, strict=True):
        changed = (old != new).any(dim=1).nonzero()[:, 0].tolist()
        assert set(changed) <= set(rows), "a row of somebody else was written"
    kept = copy_out(pool, entry)
    assert kept.num_bytes == copy_bytes(pool, entry)
    again = pool.try_allocate(num_rows)
    assert again is not None
    for place in (entry, copy_in(pool, again, kept)):
        q_proj, k_proj = (c[place.columns] for c in pool.groups[0].columns)
        assert torch.equal(k_proj, columns["l.k_proj"])
        assert torch.equal(q_proj, torch.ones(256))
        assert torch.equal(pool.groups[1].columns[0][place.columns], torch.ones(256))
        old, new = (pool.groups[0].a[1].float()[list(e.rows)] for e in (entry, place))
        assert torch.equal(old, new)


def test_rows_kept_as_they_are_multiplied_lose_nothing() -> None:
    pool = wide_pool(1 << 20, None)
    pages = pool.try_allocate(4)
    assert pages is not None
    entry = pool.write(pages, 4, {"l.o_proj": (torch.randn(4, 256), torch.randn(256, 4))})
    assert entry.error == 0.0
    assert pool.groups[0].row_scales is None
