"""Read and write safetensors files, trusting nothing that the file says.

A file is ``<8-byte little-endian header length> <UTF-8 JSON header> <data>``. The public parsers accept
duplicate JSON keys, dimensions of 0, hundreds of thousands of tensors; this one refuses whatever a
writer that means well would never produce, before a byte of data is read, and allocates nothing that
the file's real size does not justify. No torch: tensors are numpy arrays (bfloat16 by ml_dtypes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lorary.errors import CorruptArtifact, StorageError
from lorary.registry.strict_json import parse_json, show

Array = npt.NDArray[Any]

# Bits per element of every dtype of the format; bases may hold any of them, adapters three.
DTYPE_BITS: Final[dict[str, int]] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
}
_INFINITY: Final = {
    NUMPY_DTYPES["F32"]: 0x7F800000,
    NUMPY_DTYPES["F16"]: 0x7C00,
    NUMPY_DTYPES["BF16"]: 0x7F80,
}
_NAMES: Final = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_MAX_DIMS = 8
_ENTRY_KEYS: Final = {"dtype", "shape", "data_offsets"}
_INT: Final = {int}  # and not bool, which is one of its kind
_MAX_NAME = 512
_LENGTH_BYTES = 8
_PIECE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a reader accepts: dtypes, bytes of JSON header, number of tensors."""

    dtypes: frozenset[str]
    max_header_bytes: int
    max_tensors: int


ADAPTER_LIMITS: Final = Limits(
    dtypes=frozenset(NUMPY_DTYPES), max_header_bytes=8 << 20, max_tensors=20_000
)
BASE_LIMITS: Final = Limits(
    dtypes=frozenset(DTYPE_BITS), max_header_bytes=100 << 20, max_tensors=1_000_000
)


class TensorInfo(NamedTuple):
    """Where a tensor lies: bytes ``[start, end)`` counted from the beginning of the *file*."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header: tensors in the order of their data, and the free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class RawHeader(NamedTuple):
    """A header's JSON, not yet looked into, and the size of its file in bytes."""

    json: bytes
    file_size: int


def read_header(path: Path, limits: Limits = ADAPTER_LIMITS) -> Header:
    """Parse and check the header of ``path``; no tensor data is read.

    Raises:
        CorruptArtifact: the file is not safetensors, or breaks a rule or a limit.
        StorageError: the file cannot be read.
    """
    return parse_header(read_raw_header(path, limits), path.name, limits)


def read_raw_header(path: Path, limits: Limits = ADAPTER_LIMITS) -> RawHeader:
    """Read the header of ``path`` for ``parse_header``.

    Raises:
        CorruptArtifact: the file is not safetensors, or its header is too long.
        StorageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return RawHeader(_header_bytes(file, size, path, limits), size)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def read_tensor(path: Path, info: TensorInfo) -> Array:
    """Read one tensor as an array of its own dtype and shape (F16, BF16 and F32 only).

    Raises:
        CorruptArtifact: the file is shorter than its header said when it was parsed.
        StorageError: the file cannot be read.
    """
    return next(read_tensors(path, [info]))


def read_tensors(path: Path, infos: Iterable[TensorInfo]) -> Iterator[Array]:
    """Yield tensors in this order, opening the file once; one is in memory at a time.

    Raises:
        CorruptArtifact: as ``read_tensor``.
        StorageError: likewise.
    """
    try:
        with path.open("rb", buffering=0) as file:
            for info in infos:
                yield _read_tensor(file, path, info)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _read_tensor(file: FileIO, path: Path, info: TensorInfo) -> Array:
    dtype = NUMPY_DTYPES.get(info.dtype)
    if dtype is None:
        raise CorruptArtifact(
            f"tensor {show(info.name)} of {path.name} is {info.dtype}; "
            f"only {sorted(NUMPY_DTYPES)} can be read"
        )
    array = np.empty(info.shape, dtype)
    flat = array.reshape(-1).view(np.uint8)
    file.seek(info.start)
    done = 0
    view = memoryview(flat.data)
    while done < info.num_bytes:
        count = file.readinto(view[done:])
        if not count:
            raise CorruptArtifact(f"{path.name} ends inside tensor {show(info.name)}")
        done += count
    return array


def write(
    file: BinaryIO,
    layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    load: Callable[[str], Array],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors, one in memory at a time; equal content gives equal bytes on every machine.

    Order: wider dtypes first (so that every tensor is aligned), then by name.

    Args:
        file: where to write.
        layout: tensor name to dtype and shape.
        load: gives the tensor of a name.
        metadata: free-form text for the header.

    Raises:
        ValueError: a dtype is not float16, bfloat16 or float32, or ``load`` gave another tensor.
    """
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    file.write(_header_of(names, layout, metadata))
    for name in names:
        array = load(name)
        if (array.dtype, array.shape) != layout[name]:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not {layout[name]}")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _header_of(
    names: Iterable[str],
    layout: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        dtype, shape = layout[name]
        if dtype not in _NAMES:
            raise ValueError(f"{name} is {dtype}; adapters hold {sorted(NUMPY_DTYPES)}")
        end = offset + dtype.itemsize * math.prod(shape)
        offsets = [offset, end]
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        offset = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _LENGTH_BYTES)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def is_finite(array: Array) -> bool:
    """Tell whether no value is NaN or infinite, by exponent bits (no cast, no warning)."""
    bits: Array
    mask: Any
    if array.dtype == NUMPY_DTYPES["F32"]:
        bits, mask = array.reshape(-1).view(np.uint32), np.uint32(0x7F800000)
    else:
        is_half = array.dtype == NUMPY_DTYPES["F16"]
        bits, mask = array.reshape(-1).view(np.uint16), np.uint16(0x7C00 if is_half else 0x7F80)
    # A piece at a time: it stays in a core's cache, and nothing as large as the array is made.
    return not any(
        bool(np.any((bits[start : start + _PIECE] & mask) == mask))
        for start in range(0, bits.size, _PIECE)
    )


def _header_bytes(file: BinaryIO, size: int, path: Path, limits: Limits) -> bytes:
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise CorruptArtifact(f"{path.name} has {size} bytes; that is too short for safetensors")
    length = int.from_bytes(prefix, "little")
    if length > size - _LENGTH_BYTES:
        raise CorruptArtifact(
            f"{path.name} claims a header of {length} bytes, but has {size} bytes in all: "
            "it is truncated, or not safetensors"
        )
    if length > limits.max_header_bytes:
        raise CorruptArtifact(
            f"{path.name} has a header of {length} bytes; the limit is {limits.max_header_bytes}"
        )
    raw = file.read(length)
    if len(raw) != length:
        raise CorruptArtifact(f"{path.name} ends inside its header")
    if raw[:1] != b"{":
        raise CorruptArtifact(f"{path.name} is not safetensors: its header is not a JSON object")
    return raw


def parse_header(raw: RawHeader, file_name: str, limits: Limits = ADAPTER_LIMITS) -> Header:
    """Parse and check what ``read_raw_header`` returned; ``file_name`` is for errors.

    Raises:
        CorruptArtifact: it breaks a rule or a limit.
    """
    entries = parse_json(raw.json, f"header of {file_name}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptArtifact(f"{file_name}: __metadata__ must map text to text")
    if not 0 < len(entries) <= limits.max_tensors:
        raise CorruptArtifact(
            f"{file_name} holds {len(entries)} tensors; 1 to {limits.max_tensors} are accepted"
        )
    start = _LENGTH_BYTES + len(raw.json)
    infos = [_tensor(name, entry, start, file_name, limits) for name, entry in entries.items()]
    infos.sort(key=lambda info: info.start)
    _check_cover(infos, start, raw.file_size, file_name)
    return Header(tensors={info.name: info for info in infos}, metadata=metadata)


def _tensor(name: str, entry: Any, data_start: int, file_name: str, limits: Limits) -> TensorInfo:
    # Called for every tensor of every load; only what is wrong is worth a sentence.
    problem = _problem(name, entry, limits)
    if problem:
        raise CorruptArtifact(f"tensor {show(name)} of {file_name} {problem}")
    start, end = entry["data_offsets"]
    return TensorInfo(
        name, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + end
    )


def _problem(name: str, entry: Any, limits: Limits) -> str:
    """Return what is wrong with one entry of a header; empty if nothing is."""
    if len(name) > _MAX_NAME or not name.isascii() or not name.isprintable() or not name:
        return f"has a bad name: one is 1 to {_MAX_NAME} printable ASCII characters"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        return "must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in limits.dtypes:
        return f"is {dtype!r}; accepted are {sorted(limits.dtypes)}"
    if not _is_ints(shape) or len(shape) > _MAX_DIMS or min(shape, default=1) <= 0:
        return f"has shape {show(str(shape))}; up to {_MAX_DIMS} positive whole numbers"
    if not _is_ints(offsets) or len(offsets) != 2 or not 0 <= offsets[0] < offsets[1]:
        return f"has data_offsets {show(str(offsets))}"
    bits = DTYPE_BITS[dtype] * math.prod(shape)  # Python's whole numbers cannot wrap
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        return f"has {offsets[1] - offsets[0]} bytes; {dtype} {shape} needs {bits / 8:g}"
    return ""


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= _INT


def _check_cover(infos: Iterable[TensorInfo], data_start: int, size: int, file_name: str) -> None:
    position = data_start
    for info in infos:
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "leaves a gap"
            raise CorruptArtifact(f"{file_name}: tensor {show(info.name)} {kind}")
        position = info.end
    if position != size:
        what = "is truncated" if size < position else "has trailing bytes"
        raise CorruptArtifact(f"{file_name} {what}: {size} bytes, the header says {position}")
