"""From a verified folder to tensors for the pool: check everything first, then touch anything.

The file of tensors is read once, and what is checked are the very bytes that are used.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from lorary.errors import CorruptArtifact, IncompatibleAdapter, StorageError
from lorary.registry.blobs import hash_file
from lorary.registry.folder import TENSORS_FILE
from lorary.registry.tensor_layout import lora_key, magnitude_key
from lorary.registry.validate import validate_adapter
from lorary.server.native.library import Spans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lorary.registry import BaseCard
    from lorary.registry.layouts import AdapterSpec, Layouts
    from lorary.registry.safetensors_file import TensorInfo
    from lorary.server.native.library import NativeKernels

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

_PIECE_BYTES = 1 << 18
"""What a core's own cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class LoadedAdapter:
    """A version's tensors, checked; equal to itself alone.

    Attributes:
        rank: the largest rank of any module.
        tensors: per full module name A [r, in] and B [out, r], with the scale folded into B; views of
            the file's bytes where the scale is 1.
        magnitudes: DoRA's, per module [out]; none for plain LoRA.
    """

    rank: int
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    magnitudes: Mapping[str, torch.Tensor] = field(default_factory=dict)


class ReadBuffer(threading.local):
    """Memory that a thread reads one adapter after another into, and the views into it.

    New memory costs the engine more than what is read into it: the system clears its pages, and takes
    the process' other threads out of their work to give them back (docs/log.md). Views of hundreds of
    tensors are Python, which takes turns with the engine's; adapters of one recipe have the same.
    """

    MOST = 128 << 20
    """What is larger is not kept."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)
        # As long as their layout is remembered.
        self._views: WeakKeyDictionary[AdapterSpec, LoadedAdapter] = WeakKeyDictionary()

    def of(self, size: int) -> torch.Tensor:
        """Return uint8 [size], which holds anything; the thread's next call may return the same memory."""
        if size > self.MOST:
            return torch.empty(size, dtype=torch.uint8)
        if size > self._kept.numel():
            self._kept = torch.empty(size, dtype=torch.uint8)
            self._views.clear()
        return self._kept[:size]

    def views(self, spec: AdapterSpec) -> LoadedAdapter | None:
        """Return what was kept for this very object when the memory was the same."""
        return self._views.get(spec)

    def keep_views(self, spec: AdapterSpec, views: LoadedAdapter) -> None:
        """Keep views of what ``of`` returned; none of their tensors may be a copy."""
        self._views[spec] = views


class TensorBytes:
    """The file of an adapter's tensors in memory: read while it is hashed, or when a tensor is asked for.

    Args:
        kernels: sum squares, if they are there; else torch does, several times slower.
        buffer: where it is read to, until the thread's next; memory of its own by default.
    """

    def __init__(
        self, kernels: NativeKernels | None = None, buffer: ReadBuffer | None = None
    ) -> None:
        self._kernels = kernels
        self._buffer = buffer
        self._path: Path | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def hash(self, path: Path, size: int) -> str:
        """Return the hex sha256 of a file of so many bytes; they are kept, unless they are very many.

        Raises:
            OSError: it cannot be read.
        """
        if size > ReadBuffer.MOST:
            return hash_file(path)
        sha256 = hashlib.sha256()
        self._fill(path, size, sha256.update)
        return sha256.hexdigest()

    def squares(self, path: Path, infos: Sequence[TensorInfo]) -> list[float]:
        """Return the sum of squares of each tensor; NaN or infinite where a square is beyond float32.

        Raises:
            CorruptArtifact: the file is shorter than its header said.
            StorageError: it cannot be read.
        """
        self._have(path, max((info.end for info in infos), default=0))
        if self._kernels is None or any(info.dtype == "F16" for info in infos):
            return [float(self.tensor(info).float().square().sum()) for info in infos]
        return self._kernels.squares(self._bytes, _spans(tuple(infos)))

    def adapter(self, path: Path, spec: AdapterSpec) -> LoadedAdapter:
        """Return the tensors of a file that ``squares`` has read, or this reads, by their checked layout.

        Raises:
            CorruptArtifact: as ``squares``.
            StorageError: likewise.
        """
        self._have(path, max(info.end for info in spec.tensors.values()))
        buffer = self._buffer if len(self._bytes) <= ReadBuffer.MOST else None
        found = None if buffer is None else buffer.views(spec)
        if found is None:
            found = self._make(spec)
            if buffer is not None and _is_in_place(spec):
                buffer.keep_views(spec, found)
        return found

    def _make(self, spec: AdapterSpec) -> LoadedAdapter:
        tensors, magnitudes = {}, {}
        for module, (_, scale) in spec.modules.items():
            a, b = (self.tensor(spec.tensors[lora_key(module, side)]) for side in "AB")
            tensors[module] = (a, b if scale == 1.0 else b * scale)
            if spec.magnitudes:
                magnitudes[module] = self.tensor(spec.tensors[magnitude_key(module)])
        return LoadedAdapter(rank=spec.rank, tensors=tensors, magnitudes=magnitudes)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a tensor of what was read last in its own dtype and shape, a view where it is aligned."""
        dtype = _DTYPES[info.dtype]
        first, rest = divmod(info.start, dtype.itemsize)
        if rest:
            return self._bytes[info.start : info.end].clone().view(dtype).view(info.shape)
        # One operator for each of hundreds of tensors, not three.
        strides = [*itertools.accumulate(info.shape[:0:-1], operator.mul, initial=1)][::-1]
        return self._typed[dtype].as_strided(info.shape, strides, first)

    def _have(self, path: Path, end: int) -> None:
        """Have a file up to this byte, which its header has been checked to justify."""
        if self._path == path and end <= len(self._bytes):
            return
        try:
            self._fill(path, end, lambda _: None)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error

    def _fill(self, path: Path, end: int, told: Callable[[memoryview], object]) -> None:
        """Read a file up to this byte, a piece at a time, each shown to ``told`` while caches hold it."""
        self._path = None
        found = (
            torch.empty(end, dtype=torch.uint8) if self._buffer is None else self._buffer.of(end)
        )
        view, done = memoryview(found.numpy().data), 0
        with path.open("rb", buffering=0) as file:
            while done < end:
                count = file.readinto(view[done : done + _PIECE_BYTES])
                if not count:
                    raise CorruptArtifact(f"{path.name} ends before its last tensor")
                told(view[done : done + count])
                done += count
        self._path, self._bytes = path, found
        self._typed = {
            dtype: found[: end - end % dtype.itemsize].view(dtype) for dtype in _DTYPES.values()
        }


@functools.lru_cache(maxsize=16)  # those of a remembered layout are the same objects every time
def _spans(infos: tuple[TensorInfo, ...]) -> Spans:
    return Spans(
        [info.start for info in infos],
        [info.num_bytes // _DTYPES[info.dtype].itemsize for info in infos],
        [info.dtype == "BF16" for info in infos],
    )


def _is_in_place(spec: AdapterSpec) -> bool:
    """Whether the pool can take every tensor from where the file has it: nothing scaled, nothing moved."""
    return all(lora.scale == 1.0 for lora in spec.modules.values()) and not any(
        info.start % _DTYPES[info.dtype].itemsize for info in spec.tensors.values()
    )


def load_adapter(
    folder: Path,
    card: BaseCard,
    *,
    modules: frozenset[str],
    max_rank: int,
    file: TensorBytes | None = None,
    layouts: Layouts | None = None,
) -> LoadedAdapter:
    """Read a canonical version.

    Args:
        folder: what ``Registry.fetch`` returned: hashes are verified, the content is not trusted.
        card: the resident base's shapes.
        modules: full names of the layers that take adapters here.
        max_rank: largest rank this server accepts.
        file: reads the tensors, or has read them while it hashed them; what is returned lies in it.
        layouts: what was found right before; nothing by default.

    Raises:
        CorruptArtifact: damaged or hostile content.
        IncompatibleAdapter: another base, too high a rank, or a module that is not served.
    """
    file = file or TensorBytes()
    spec = validate_adapter(folder, card, max_rank=max_rank, squares=file.squares, layouts=layouts)
    foreign = sorted(spec.modules.keys() - modules)
    if foreign:
        raise IncompatibleAdapter(
            f"the adapter changes {foreign[:3]}{'…' if len(foreign) > 3 else ''}, which this server "
            "does not serve with adapters; train it without these modules"
        )
    return file.adapter(folder / TENSORS_FILE, spec)
