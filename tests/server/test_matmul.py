"""The packed product against float32 sums of the same numbers."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lorary.server.native import library as native

# One rounding of the result to bfloat16; float32 sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def kernels_for(dtype: torch.dtype) -> native.NativeKernels:
    kernels = native.load()
    assert not isinstance(kernels, str), kernels
    if not kernels.supports_layers(dtype):
        pytest.skip(f"this CPU has no product in {dtype}")
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 13, 14, 15, 29, 64])
@pytest.mark.parametrize(("out", "width"), [(32, 64), (96, 2), (49, 70), (1, 2050), (80, 1024)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_equals_torch(
    rows: int, out: int, width: int, dtype: torch.dtype, has_bias: bool
) -> None:
    kernels = kernels_for(dtype)
    torch.manual_seed(rows)
    # Rows of a wider matrix: neither weight nor input need be contiguous as a whole.
    weight = torch.randn(out, width + 6).to(dtype)[:, :width]
    x = torch.randn(rows, width + 4).to(dtype)[:, :width]
    bias = torch.randn(out).to(dtype) if has_bias else None
    assert kernels.can_pack(weight)
    packed = kernels.pack(weight, bias)
    expected = x.float() @ weight.float().t()
    if bias is not None:
        expected += bias.float()
    for rows_of in (dtype, torch.float32):
        actual = packed.linear(x.to(rows_of))
        assert actual.dtype == rows_of
        error = (actual.float() - expected).abs().max()
        assert error <= TOLERANCE[rows_of] * expected.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (49, 70), (40, 1026)])
def test_lengths_of_rows_with_a_change(kind: str, out: int, width: int) -> None:
    """Of whole panels and of parts; in 8 bits of what products with the unit vectors say the weight is."""
    dtype = torch.float32 if kind == "int8" else getattr(torch, kind)
    kernels = kernels_for(dtype)
    if kind == "int8" and not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, width, generator=generator).to(dtype)
    if kind == "int8":
        packed = kernels.pack_int8(weight, None)
        weight = packed.linear(torch.eye(width)).t()
    else:
        packed = kernels.pack(weight, None)
    a, b = torch.randn(5, width, generator=generator), torch.randn(out, 5, generator=generator)
    expected = (weight.double() + b.double() @ a.double()).norm(dim=1).float()
    for start, stop in ((0, out), (0, 1), (31, 34), (out - 3, out)):
        found = packed.norms(start, a, b[start:stop])
        assert torch.allclose(found, expected[start:stop], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "out"), [(1, 1), (3, 49), (15, 32), (32, 1030)])
def test_the_largest_output_is_that_of_the_product(rows: int, out: int, dtype: torch.dtype) -> None:
    """The first of equal ones, wherever their panels are, with a bias and without; 0 where none is a number."""
    kernels = kernels_for(dtype)
    generator = torch.Generator().manual_seed(out)
    x = torch.randn(rows, 70, generator=generator)
    weight = torch.randn(out, 70, generator=generator)
    weight[out // 2 :] = weight[: out - out // 2].clone()
    found = (ctypes.c_int64 * rows)()
    for bias in (None, torch.randn(out, generator=generator)):
        packed = kernels.pack(weight.to(dtype), bias)
        assert packed.largest is not None
        *arguments, _ = packed.largest_arguments(x, found)
        for threads in (1, 3):
            packed.largest(*arguments, threads)
            assert list(found) == kernels.argmax(packed.linear(x))
        kept = x.clone()
        x.fill_(float("nan"))
        packed.largest(*arguments, 1)
        assert list(found) == [0] * rows
        x.copy_(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_company(dtype: torch.dtype) -> None:
    kernels = kernels_for(dtype)
    torch.manual_seed(0)
    packed = kernels.pack(torch.randn(100, 2100).to(dtype), None)
    x = torch.randn(31, 2100)
    together = packed.linear(x)
    alone = torch.cat([packed.linear(row[None]) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("width", "large"), [(70, (0, 69)), (2050, (18, 1500, 2049))])
def test_rests_of_the_largest_elements_are_multiplied(width: int, large: tuple[int, ...]) -> None:
    """Rounding a row of a few large elements to bfloat16 costs next to nothing of the product."""
    kernels = kernels_for(torch.bfloat16)
    torch.manual_seed(width)
    weight = torch.randn(48, width).bfloat16()
    x = torch.randn(5, width) * 1e-3
    x[:, list(large)] = 100 * torch.randn(5, len(large))
    exact = x.double() @ weight.double().t()
    rounded = x.bfloat16().double() @ weight.double().t()
    actual = kernels.pack(weight, None).linear(x).double()
    assert (actual - exact).abs().max() < 0.02 * (rounded - exact).abs().max()


def test_what_cannot_be_packed() -> None:
    kernels = kernels_for(torch.float32)
    assert not kernels.can_pack(torch.zeros(4, 3))
    assert not kernels.can_pack(torch.zeros(4, 4, dtype=torch.float16))
    assert not kernels.can_pack(torch.zeros(4, 4).t()[:, :2])


def int8_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Round both to 8 bits, a scale for each 64 elements of a row, and multiply in float64."""

    def rounded(m: torch.Tensor) -> torch.Tensor:
        groups = []
        for start in range(0, m.shape[1], 64):
            part = m[:, start : start + 64].float()
            scale = part.abs().amax(dim=1, keepdim=True) / 127
            groups.append(torch.round(part / scale.clamp_min(1e-30)).double() * scale)
        return torch.cat(groups, dim=1)

    return rounded(x) @ rounded(weight).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 14, 15, 40])
@pytest.mark.parametrize(("out", "width"), [(32, 64), (49, 70), (96, 2), (7, 1538)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_product_equals_the_reference(
    rows: int, out: int, width: int, dtype: torch.dtype, has_bias: bool
) -> None:
    kernels = kernels_for(dtype)
    if not kernels.has_int8:
        pytest.skip("this CPU has no product with 8-bit weights")
    torch.manual_seed(rows)
    weight = torch.randn(out, width).to(dtype)
    weight[0] = 0.0
    x = torch.randn(rows, width + 4).to(dtype)[:, :width]
    x[-1] = 0.0
    bias = torch.randn(out).to(dtype) if has_bias else None
    packed = kernels.pack_int8(weight, bias)
    expected = int8_reference(x, weight)
    if bias is not None:
        expected += bias.double()
    actual = packed.linear(x)
    assert actual.dtype == dtype
    # A value half-way between two of the 255 may fall either way.
    least = expected.abs().max().clamp_min(1.0)
    assert (actual.double() - expected).abs().max() <= max(TOLERANCE[dtype], 2e-3) * least
    alone = torch.cat([packed.linear(row[None]) for row in x])
    assert torch.equal(actual, alone)
