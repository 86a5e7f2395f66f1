"""Weights that lie in mapped files: let go of pages that were read, and copy what stays.

transformers maps safetensors files, so a model that is loaded as it lies on disk takes no memory until
it is read. What was read then stays resident for as long as one tensor of the file lives: a base whose
weights are converted one after the other would lie in memory twice. Elsewhere than on Linux nothing is
known about mappings, and nothing is done.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


# <linux/mman.h>; Python's mmap module does not name it yet.
_MADV_PAGEOUT = 21
ENOUGH_BYTES = 8 << 20
"""How much of mapped files may become resident before it is worth looking for the mappings."""


class _Mapping(NamedTuple):
    start: int
    end: int
    path: str


class MappedFiles:
    """The mappings of files as they are when it is made, which holds for every tensor that is there by then.

    The kernel writes the list anew for whoever reads it, and a process with torch has thousands of mappings:
    read once for every weight, it was most of what loading took.
    """

    def __init__(self) -> None:
        self._mappings = _mappings()

    def release(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let go of the resident pages of those tensors that lie in mapped files.

        A later access reads them again. Other tensors are left as they are.
        """
        for tensor in tensors:
            if self._holds(tensor):
                _drop_pages(tensor)

    def own(self, module: torch.nn.Module) -> None:
        """Copy those parameters and buffers that lie in mapped files into memory of their own.

        One at a time; the file is unmapped with the last.
        """
        for tensor in [*module.parameters(), *module.buffers()]:
            if self._holds(tensor):
                mapped = tensor.data
                tensor.data = mapped.clone()
                _drop_pages(mapped)
                del mapped
        trim_heap()

    def _holds(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return False
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(m.start <= start and end <= m.end for m in self._mappings)


class Readings:
    """Lets go of what has been read of files that are mapped, whenever it is enough.

    Args:
        paths: the files, which may be mapped and unmapped meanwhile.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = {str(path.resolve()) for path in paths}
        self._last = _resident_file_bytes()

    def release_enough(self) -> None:
        """Let go of what has been read since the last time, if it is enough."""
        now = _resident_file_bytes()
        if now - self._last >= ENOUGH_BYTES:
            self.release()
        else:
            self._last = min(self._last, now)

    def release(self) -> None:
        """Let go of what has been read; a later access reads it again."""
        for mapping in _mappings():
            if mapping.path in self._paths:
                _drop(mapping.start, mapping.end)
        self._last = _resident_file_bytes()


def _resident_file_bytes() -> int:
    """Return how much of mapped files is resident, in one short line of the kernel's."""
    if sys.platform != "linux":
        return 0
    # size resident shared text ..., in pages (proc_pid_statm(5)); shared: of files, and of shared memory
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE


def trim_heap() -> None:
    """Hand freed memory back to the system.

    The allocator keeps blocks of a few megabytes, and taken and freed in turn they lie in pieces.
    """
    if sys.platform == "linux" and hasattr(_libc(), "malloc_trim"):  # glibc has it, musl does not
        _libc().malloc_trim(0)


def _mappings() -> list[_Mapping]:
    """Return this process' mappings of files that are not code, as they are now."""
    if sys.platform != "linux":
        return []
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        # 7f12a0000000-7f12b0000000 r--p 00000000 08:01 1234   /path, perhaps with spaces
        addresses, rights, _offset, _device, inode, *rest = line.split(maxsplit=5)
        if inode != "0" and rest and "x" not in rights:
            start, end = (int(text, 16) for text in addresses.split("-"))
            found.append(_Mapping(start, end, rest[0]))
    return found


def _drop_pages(tensor: torch.Tensor) -> None:
    """Drop a tensor's pages; whole ones only, for the neighbours may be in use."""
    start = tensor.data_ptr()
    _drop(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, start + tensor.nbytes)


def _drop(start: int, end: int) -> None:
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= start:
        return
    # Not DONTNEED: transformers' threads open and close mappings meanwhile, and whatever has come to lie
    # there since the list was read would lose its content. This one only takes clean pages of files away.
    if _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT):
        code = ctypes.get_errno()
        # The mapping is gone by now; or a Linux before 5.4, where pages stay until the file is unmapped.
        if code not in (errno.ENOMEM, errno.EINVAL):
            raise OSError(code, f"madvise of {end - start} bytes of mapped weights failed")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
