"""From a verified folder to tensors for the pool: check everything first, then touch anything.

The file of tensors is read once, and what is checked are the very bytes that are used.
"""

from __future__ import annotations

import itertools
import operator
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lorary.errors import CorruptArtifact, IncompatibleAdapter, StorageError
from lorary.registry.tensor_layout import lora_key, magnitude_key
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.registry import BaseCard
    from lorary.registry.safetensors_file import TensorInfo
    from lorary.server.native.library import NativeKernels

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """A version's tensors, checked.

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
    """Memory that a thread reads one adapter after another into.

    New memory costs the engine more than what is read into it: the system clears its pages, and takes
    the process' other threads out of their work to give them back (docs/log.md).
    """

    _MOST = 128 << 20
    """What is larger is not kept."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> torch.Tensor:
        """Return uint8 [size], which holds anything; the thread's next call may return the same memory."""
        if size > self._MOST:
            return torch.empty(size, dtype=torch.uint8)
        if size > self._kept.numel():
            self._kept = torch.empty(size, dtype=torch.uint8)
        return self._kept[:size]


class TensorBytes:
    """The file of an adapter's tensors in memory, read when the first tensor is asked for.

    Args:
        path: the file.
        kernels: sum squares, if they are there.
        buffer: where it is read to.
    """

    def __init__(self, path: Path, kernels: NativeKernels | None, buffer: ReadBuffer) -> None:
        self._path = path
        self._kernels = kernels
        self._buffer = buffer
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._views: dict[torch.dtype, torch.Tensor] = {}
        self._end = 0

    def squares(self, path: Path, infos: Sequence[TensorInfo]) -> list[float]:
        """Return the sum of squares of each tensor; NaN or infinite where a square is beyond float32.

        Raises:
            CorruptArtifact: the file is shorter than its header said.
            StorageError: it cannot be read.
        """
        assert path == self._path
        self._read(max((info.end for info in infos), default=0))
        if self._kernels is None or any(info.dtype == "F16" for info in infos):
            return [float(self.tensor(info).float().square().sum()) for info in infos]
        return self._kernels.squares(
            self._bytes,
            [info.start for info in infos],
            [info.num_bytes // _DTYPES[info.dtype].itemsize for info in infos],
            [_DTYPES[info.dtype] for info in infos],
        )

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a tensor of its own dtype and shape, a view of the bytes.

        Raises:
            CorruptArtifact: as ``squares``.
            StorageError: likewise.
        """
        self._read(info.end)
        dtype = _DTYPES[info.dtype]
        first, rest = divmod(info.start, dtype.itemsize)
        if rest:
            return self._bytes[info.start : info.end].clone().view(dtype).view(info.shape)
        # One operator for each of hundreds of tensors, not three.
        strides = [*itertools.accumulate(info.shape[:0:-1], operator.mul, initial=1)][::-1]
        return self._views[dtype].as_strided(info.shape, strides, first)

    def _read(self, end: int) -> None:
        """Have the file up to this byte, which its header has been checked to justify."""
        if end <= self._end:
            return
        found = self._buffer.of(end)
        view, done = memoryview(found.numpy().data), 0
        try:
            with self._path.open("rb", buffering=0) as file:
                while done < end:
                    count = file.readinto(view[done:])
                    if not count:
                        raise CorruptArtifact(f"{self._path.name} ends before its last tensor")
                    done += count
        except OSError as error:
            raise StorageError(f"cannot read {self._path}: {error.strerror or error}") from error
        self._bytes, self._end = found, end
        self._views = {
            dtype: found[: end - end % dtype.itemsize].view(dtype) for dtype in _DTYPES.values()
        }


def load_adapter(
    folder: Path,
    card: BaseCard,
    *,
    modules: frozenset[str],
    max_rank: int,
    kernels: NativeKernels | None = None,
    buffer: ReadBuffer | None = None,
) -> LoadedAdapter:
    """Read a canonical version.

    Args:
        folder: what ``Registry.fetch`` returned: hashes are verified, the content is not trusted.
        card: the resident base's shapes.
        modules: full names of the layers that take adapters here.
        max_rank: largest rank this server accepts.
        kernels: check the numbers, if they are there; else torch does, several times slower.
        buffer: what is returned lies in it, until the thread's next load; memory of its own by default.

    Raises:
        CorruptArtifact: damaged or hostile content.
        IncompatibleAdapter: another base, too high a rank, or a module that is not served.
    """
    file = TensorBytes(folder / "adapter_model.safetensors", kernels, buffer or ReadBuffer())
    spec = validate_adapter(folder, card, max_rank=max_rank, squares=file.squares)
    foreign = sorted(spec.modules.keys() - modules)
    if foreign:
        raise IncompatibleAdapter(
            f"the adapter changes {foreign[:3]}{'…' if len(foreign) > 3 else ''}, which this server "
            "does not serve with adapters; train it without these modules"
        )
    tensors, magnitudes = {}, {}
    for module, (_, scale) in spec.modules.items():
        a, b = (file.tensor(spec.tensors[lora_key(module, side)]) for side in "AB")
        tensors[module] = (a, b if scale == 1.0 else b * scale)
        if spec.magnitudes:
            magnitudes[module] = file.tensor(spec.tensors[magnitude_key(module)])
    return LoadedAdapter(rank=spec.rank, tensors=tensors, magnitudes=magnitudes)
