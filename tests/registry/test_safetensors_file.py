from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorary.errors import CorruptArtifact, StorageError
from lorary.registry.safetensors_file import (
    BASE_LIMITS,
    Array,
    Limits,
    is_finite,
    read_header,
    read_tensor,
    write,
)

RawWriter = Callable[..., None]
ONE = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
EIGHT = bytes(8)


def write_all(path: Path, tensors: dict[str, Array]) -> None:
    layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with path.open("wb") as file:
        write(file, layout, tensors.__getitem__, {"format": "pt"})


def sample() -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {
        "b": generator.standard_normal((3, 5)).astype(np.float32),
        "a": generator.standard_normal((1, 7)).astype(np.float16),
        "c": generator.standard_normal((7,)).astype(ml_dtypes.bfloat16),
    }


def test_what_is_written_reads_back_here_and_in_torch(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", sample()
    write_all(path, tensors)
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    theirs = safetensors.torch.load_file(path)
    for name, array in tensors.items():
        ours = read_tensor(path, header.tensors[name])
        assert ours.dtype == array.dtype
        assert np.array_equal(ours, array)
        assert np.array_equal(theirs[name].float().numpy(), array.astype(np.float32))


def test_what_torch_writes_reads_here(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    want = {"w": torch.randn(3, 4), "v": torch.randn(5).to(torch.bfloat16)}
    safetensors.torch.save_file(want, path, metadata={"format": "pt"})
    header = read_header(path)
    for name, tensor in want.items():
        got = read_tensor(path, header.tensors[name]).astype(np.float32)
        assert np.array_equal(got, tensor.float().numpy())


def test_bytes_do_not_depend_on_the_order_of_insertion(tmp_path: Path) -> None:
    write_all(tmp_path / "1", sample())
    write_all(tmp_path / "2", dict(reversed(sample().items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_writer_is_told_when_the_loader_gives_another_tensor() -> None:
    with pytest.raises(ValueError, match="not"):
        write(io.BytesIO(), {"w": (np.dtype("f4"), (2,))}, lambda _: np.zeros(3, np.float32), {})
    with pytest.raises(ValueError, match="int64"):
        write(io.BytesIO(), {"w": (np.dtype("i8"), (2,))}, lambda _: np.zeros(2, np.int64), {})


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {**ONE["w"], **changes}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "not a JSON object"),
        (b"[]", b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b'{"w": \xff}', b"", "not JSON"),
        (b"{" + b'"a":{' * 100_000, b"", "not JSON"),
        (b'{"w": 1' + b"1" * 5000 + b"}", b"", "not JSON"),
        ({}, b"", "0 tensors"),
        ({"__metadata__": {"a": 1}, **ONE}, EIGHT, "__metadata__"),
        ({"__metadata__": [], **ONE}, EIGHT, "__metadata__"),
        ({"w": []}, b"", "exactly dtype"),
        ({"w": {**ONE["w"], "more": 1}}, EIGHT, "exactly dtype"),
        (entry(dtype="I8"), EIGHT, "accepted are"),
        (entry(dtype=["F32"]), EIGHT, "accepted are"),
        (entry(shape=[0]), EIGHT, "positive whole"),
        (entry(shape=[-2]), EIGHT, "positive whole"),
        (entry(shape=[2.0]), EIGHT, "positive whole"),
        (entry(shape=[True, 2]), EIGHT, "positive whole"),
        (entry(shape=[1] * 9), EIGHT, "positive whole"),
        (entry(shape=[2**32, 2**32]), EIGHT, "needs"),
        (entry(shape=[3]), EIGHT, "needs"),
        (entry(data_offsets=[8, 0]), EIGHT, "data_offsets"),
        (entry(data_offsets=[-8, 0]), EIGHT, "data_offsets"),
        (entry(data_offsets=[0]), EIGHT, "data_offsets"),
        (entry(data_offsets=[8, 16]), bytes(16), "gap"),
        (ONE, bytes(7), "truncated"),
        (ONE, bytes(9), "trailing"),
        ({**ONE, "v": {**ONE["w"], "data_offsets": [4, 12]}}, bytes(12), "overlaps"),
        ({"": ONE["w"]}, EIGHT, "printable ASCII"),
        ({"w" * 513: ONE["w"]}, EIGHT, "printable ASCII"),
        ({"w\n": ONE["w"]}, EIGHT, "printable ASCII"),
        ({"wé": ONE["w"]}, EIGHT, "printable ASCII"),
    ],
)
def test_a_malformed_header_is_refused(
    tmp_path: Path, raw_safetensors: RawWriter, header: Any, data: bytes, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    raw_safetensors(path, header, data)
    with pytest.raises(CorruptArtifact, match=message):
        read_header(path)


def test_a_duplicate_key_is_refused(tmp_path: Path, raw_safetensors: RawWriter) -> None:
    path = tmp_path / "x.safetensors"
    one = json.dumps(ONE)
    raw_safetensors(path, f"{one[:-1]}, {one[1:]}".encode(), EIGHT)
    with pytest.raises(CorruptArtifact, match="'w' twice"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10_000])
def test_a_header_longer_than_the_file_is_refused(
    tmp_path: Path, raw_safetensors: RawWriter, length: int
) -> None:
    path = tmp_path / "x.safetensors"
    raw_safetensors(path, ONE, EIGHT, length=length)
    with pytest.raises(CorruptArtifact, match="claims a header"):
        read_header(path)


def test_limits_on_header_bytes_and_tensor_count(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_all(path, {f"t{i}": np.ones(1, np.float32) for i in range(20)})
    few = Limits(dtypes=frozenset({"F32"}), max_header_bytes=10_000, max_tensors=19)
    short = Limits(dtypes=frozenset({"F32"}), max_header_bytes=100, max_tensors=20)
    with pytest.raises(CorruptArtifact, match="20 tensors"):
        read_header(path, few)
    with pytest.raises(CorruptArtifact, match="the limit is 100"):
        read_header(path, short)


def test_a_base_may_hold_other_dtypes_but_they_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.ones(4, np.int8)}, path)
    info = read_header(path, BASE_LIMITS).tensors["w"]
    with pytest.raises(CorruptArtifact, match="I8"):
        read_tensor(path, info)


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_all(path, sample())
    info = list(read_header(path).tensors.values())[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match="ends inside"):
        read_tensor(path, info)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        read_header(tmp_path / "none")


@given(position=st.integers(0, 400), value=st.integers(0, 255))
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300
)
def test_one_changed_byte_never_breaks_the_parser(
    tmp_path: Path, position: int, value: int
) -> None:
    path = tmp_path / "fuzz.safetensors"
    write_all(path, sample())
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CorruptArtifact:
        return
    for info in header.tensors.values():
        assert read_tensor(path, info).shape == info.shape


@given(st.binary(max_size=200))
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)
def test_random_bytes_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifact):
        read_header(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(dtype: Any, value: float) -> None:
    array = np.ones((4, 4), dtype)
    assert is_finite(array)
    array[2, 3] = dtype(value)
    assert not is_finite(array)
    largest = float(ml_dtypes.finfo(dtype).max)
    assert is_finite(np.full((2, 2), largest).astype(dtype))
