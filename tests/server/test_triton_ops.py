"""The GPU kernels equal the reference: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from lorary.errors import ConfigError
from lorary.server.adapters.columns import column_scales
from lorary.server.adapters.layers import LoraModel, step_segments
from lorary.server.adapters.ops import triton_ops
from lorary.server.adapters.segments import NO_COLUMNS, PoolEntry, Segments
from lorary.server.adapters.tiles import TILE_FIELDS, TILE_ROWS, RowTiles
from tests.server.ops_cases import TOLERANCE, Case, compile_for_gpus, entries

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.server.conftest import EngineWorld

pytest.importorskip("triton", reason="Triton has no wheel for this system")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# With a card they are tests of that card: pytest -m gpu.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
OUTS = (40, 16)
POPULARITY: dict[str, tuple[int, Callable[[int], int]]] = {
    # Number of adapters, and which one a row has; -1 is the bare base.
    "same": (1, lambda _row: 0),
    "distinct": (64, lambda row: row),
    "skewed": (4, lambda row: row % 4 if row % 3 == 0 else 0),
    "base between": (3, lambda row: row % 4 - 1),
    "base": (1, lambda _row: -1),
}


@pytest.fixture(scope="module")
def kernels() -> triton_ops.TritonKernels:
    loaded = triton_ops.load()
    assert not isinstance(loaded, str), loaded
    return loaded


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", POPULARITY)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("rank", [1, 8, 16, 24, 64, 128])
def test_product_equals_the_reference(
    kernels: triton_ops.TritonKernels,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    rows: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    """Adapters of the rank and of half of it, over scattered pool rows."""
    number, adapter_of = POPULARITY[kind]
    number = min(number, rows)
    pool = entries([rank if i % 2 == 0 else -(-rank // 2) for i in range(number)], number * rank)
    chosen = [adapter_of(row) for row in range(rows)]
    row_entries = [pool[i % number] if i >= 0 else None for i in chosen]
    outs: tuple[int, ...] = OUTS
    if rows == 64:
        # Fewer programs where there are many tiles, for each costs the interpreter milliseconds.
        outs = OUTS[:1]
        monkeypatch.setattr(triton_ops, "_RANK_PROGRAMS", 1)
    capacity = number * rank
    case = Case.random(row_entries, capacity=capacity, dtype=dtype, outs=outs, device=DEVICE)
    segments = case.segments(long_from=rows + 1)
    if segments is None:
        assert all(e is None for e in row_entries)
        return
    actual = case.y.clone()
    kernels.bind(case.a, case.b).add_rows(actual, case.x, segments)
    case.check(actual, segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_inputs_and_outputs_are_cut(
    kernels: triton_ops.TritonKernels, dtype: torch.dtype
) -> None:
    """Two stretches of ``in`` that it does not divide into evenly, and outputs of several blocks."""
    pool = entries([20, 3], 23)
    case = Case.random(
        [pool[0], pool[1], None, pool[0]],
        capacity=23,
        dtype=dtype,
        outs=(300, 17),
        width=2300,
        device=DEVICE,
    )
    segments = case.segments(long_from=9)
    assert segments is not None
    actual = case.y.clone()
    kernels.bind(case.a, case.b).add_rows(actual, case.x, segments)
    case.check(actual, segments)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_product_with_rows_kept_in_fewer_bits(
    kernels: triton_ops.TritonKernels, storage: torch.dtype, dtype: torch.dtype
) -> None:
    if not kernels.supports_storage(storage):
        pytest.skip("this GPU has no 8-bit floats")
    pool = entries([5, 24, 3], 40)
    row_entries = [pool[i % 4] if i % 4 < 3 else None for i in range(9)]
    case = Case.random(
        row_entries, capacity=40, dtype=dtype, outs=OUTS, device=DEVICE, storage=storage
    )
    segments = case.segments(long_from=99)
    assert segments is not None
    actual = case.y.clone()
    bound = kernels.bind(case.a, case.b, case.row_scales, dtype)
    bound.add_rows(actual, case.x, segments)
    case.check(actual, segments)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("storage", [None, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_column_scales_change_the_rows_of_their_adapter_alone(
    kernels: triton_ops.TritonKernels, storage: torch.dtype | None, has_bias: bool
) -> None:
    if storage is not None and not kernels.supports_storage(storage):
        pytest.skip("this GPU has no 8-bit floats")
    case = Case.with_columns(
        dtype=torch.float32, outs=(300, 16), device=DEVICE, storage=storage, has_bias=has_bias
    )
    segments = case.segments(long_from=99)
    assert segments is not None
    actual = case.y.clone()
    bound = kernels.bind(case.a, case.b, case.row_scales, torch.float32, case.bias)
    bound.add_rows(actual, case.x, segments)
    case.check(actual, segments)
    plain = case.without_columns()
    alone, beside = plain.y.clone(), plain.segments(long_from=99)
    assert beside is not None
    bound.add_rows(alone, plain.x, beside)
    for row, entry in enumerate(case.row_entries):
        has_columns = entry is not None and entry.columns != NO_COLUMNS
        assert torch.equal(actual[row], alone[row]) != has_columns


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_row_does_not_depend_on_its_company(
    kernels: triton_ops.TritonKernels, dtype: torch.dtype
) -> None:
    """The same row gives the same bits alone, in a crowd, as part of a prompt, and elsewhere."""
    pool = entries([9, 33, 16], 58)
    crowd = [pool[i % 3] if i % 5 else None for i in range(12)] + [pool[1]] * 20
    case = Case.random(crowd, capacity=58, dtype=dtype, outs=OUTS, width=1100, device=DEVICE)
    bound = kernels.bind(case.a, case.b)
    segments = case.segments(long_from=99)
    assert segments is not None
    together = case.y.clone()
    bound.add_rows(together, case.x, segments)
    for row in (1, 2, 3, 11, 12, 25, 31):
        single = Segments.build([crowd[row]], device=case.x.device, long_from=99)
        assert single is not None
        alone = case.y[row : row + 1].clone()
        bound.add_rows(alone, case.x[row : row + 1].contiguous(), single)
        assert torch.equal(alone[0], together[row])


def test_empty_tiles_do_nothing(kernels: triton_ops.TritonKernels) -> None:
    """What a captured launch needs: as many tiles as rows, most of them empty."""
    pool = entries([5, 12], 20)
    row_entries = [pool[0], None, pool[1], pool[0], None, pool[1]]
    case = Case.random(row_entries, capacity=20, dtype=torch.float32, outs=OUTS, device=DEVICE)
    segments = case.segments(long_from=99)
    assert segments is not None
    exact, padded = segments.tiles, _padded(segments, num_tiles=6)
    assert (exact.num_tiles, padded.num_tiles) == (2, 6)
    assert padded.tiles[2:].count_nonzero() == 0
    segments.__dict__["tiles"] = padded
    actual = case.y.clone()
    kernels.bind(case.a, case.b).add_rows(actual, case.x, segments)
    case.check(actual, segments)


def _padded(segments: Segments, num_tiles: int) -> RowTiles:
    tiling = segments.tiling
    empty = [0] * TILE_FIELDS * (num_tiles - tiling.num_tiles)
    tiling = replace(tiling, tiles=tiling.tiles + empty)
    return tiling.on(tiling.flat().to(segments.device))


def test_tiles_hold_each_row_once_and_no_padding() -> None:
    pool = [PoolEntry((3, 1), (1.0, 0.5)), PoolEntry((7,), (2.0,), columns=5)]
    rows = [pool[0]] * (TILE_ROWS + 3) + [None, pool[1]]
    segments = Segments.build(rows, device=torch.device("cpu"), long_from=99)
    assert segments is not None
    tiles = segments.tiles
    assert tiles.tiles.tolist() == [
        [0, TILE_ROWS, 0, 2, 0, -1],
        [TILE_ROWS, 3, 0, 2, 2 * TILE_ROWS, -1],
        [TILE_ROWS + 3, 1, 2, 1, 2 * TILE_ROWS + 6, 5],
    ]
    assert tiles.rows.tolist() == [*range(TILE_ROWS + 3), TILE_ROWS + 4]
    assert tiles.rank_rows.tolist() == [3, 1, 7]
    assert tiles.rank_scales.tolist() == [1.0, 0.5, 2.0]
    assert (tiles.num_sums, tiles.max_rank) == (2 * (TILE_ROWS + 3) + 1, 2)


def test_model_with_these_kernels_equals_one_with_torch_operators(
    make_world: Callable[..., EngineWorld], tiny_base: Path
) -> None:
    """The layers' own wiring: q/k/v and gate/up in one call each, rows of LoRA, of DoRA, of the base."""
    from transformers import AutoModelForCausalLM

    source = make_world(start=False)
    resolve = source.registry.resolve
    adapters = [source.residency._load(resolve(name)) for name in ("alpha", "echo")]
    generator = torch.Generator().manual_seed(0)
    dora = replace(
        adapters[0],
        magnitudes={
            module: torch.rand(b.shape[0], generator=generator) + 1
            for module, (_, b) in adapters[0].tensors.items()
        },
    )
    token_ids = torch.tensor([[5, 9, 30, 11, 44, 2, 7]], device=DEVICE)
    logits: dict[str, torch.Tensor] = {}
    for ops in ("triton", "torch"):
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).to(DEVICE)
        lora = LoraModel(model, memory_bytes=1 << 22, dtype=torch.float32, ops=ops)  # type: ignore[arg-type]
        assert all(
            isinstance(g.bound, triton_ops.TritonPool) == (ops == "triton") for g in lora.groups
        )
        placed = []
        for adapter in (*adapters, dora):
            columns = column_scales(lora.groups, adapter) if adapter.magnitudes else None
            num_rows = lora.pool.num_rows(adapter.rank, has_columns=columns is not None)
            pages = lora.pool.try_allocate(num_rows)
            assert pages is not None
            placed.append(lora.pool.write(pages, adapter.rank, adapter.tensors, columns))
        rows = [placed[0], None, placed[1], placed[2], None, placed[2], placed[0]]
        segments = Segments.build(rows, device=token_ids.device, long_from=lora.long_from)
        with torch.inference_mode(), step_segments(segments):
            logits[ops] = model(token_ids).logits[0].cpu()
        plain = Segments.build(
            [placed[0] if entry is placed[2] else entry for entry in rows],
            device=token_ids.device,
            long_from=lora.long_from,
        )
        for other in (None, plain):
            with torch.inference_mode(), step_segments(other):
                assert (model(token_ids).logits[0].cpu() - logits[ops]).abs().max() > 0.1
    assert torch.allclose(logits["triton"], logits["torch"], atol=1e-4)


def test_kernels_asked_for_by_name_must_be_there(
    monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    monkeypatch.setattr(triton_ops, "load", lambda: "no GPU")
    with pytest.raises(ConfigError, match="no GPU"):
        LoraModel(model, memory_bytes=1 << 22, dtype=torch.float32, ops="triton")


COMPILE = """
from lorary.server.adapters.ops import triton_kernels as kernels

STEP = {"tiles": "*i32", "rows": "*i32", "rank_rows": "*i32"}
SIZES = {"SPLIT": 4, "BLOCK_ROWS": 16, "BLOCK_RANK": 16}
KEPT = {"i8": triton.language.int8, "fp8e4nv": triton.language.float8e4nv, **LANGUAGE}
for capability, name, kept in ((80, "bf16", "bf16"), (80, "fp16", "fp16"), (80, "fp32", "fp32"),
                               (80, "bf16", "i8"), (90, "bf16", "bf16"), (90, "bf16", "fp8e4nv")):
    shrink = dict(x=f"*{name}", a=f"*{kept}", t="*fp32", **STEP, rank_scales="*fp32", row_scales="*fp32",
                  **dict.fromkeys("in_features cap members num_sums".split(), "i32"))
    compile(kernels.shrink, shrink, dict(SIZES, DOT=LANGUAGE[name], BLOCK_IN=128, HAS_SCALES=kept in ("i8", "fp8e4nv")), capability)
    expand = dict(y=f"*{name}", t="*fp32", b_table="*i64", blocks="*i32", bias="*fp32", **STEP,
                  **dict.fromkeys("y_row members num_sums".split(), "i32"))
    constants = dict(HAS_BIAS=kept != "i8", B=KEPT[kept], ALIGN=16, PRECISION="ieee" if name == "fp32" else "tf32x3")
    compile(kernels.expand, expand, dict(SIZES, BLOCK_OUT=128, **constants), capability)
"""


def test_kernels_compile_for_gpus() -> None:
    """All but float32 with tensor cores."""
    made = compile_for_gpus(COMPILE)
    assert len(made) == 12
    assert all(line.endswith("True") for line in made if line.split()[2] != "*fp32"), made
