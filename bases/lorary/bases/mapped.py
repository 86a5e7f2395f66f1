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


class _Mapping(NamedTuple):
    start: int
    end: int
    path: str


def release_files(paths: Iterable[Path]) -> None:
    """Let go of the resident pages of these files' mappings; a later access reads them again."""
    wanted = {str(path.resolve()) for path in paths}
    for mapping in _mappings():
        if mapping.path in wanted:
            _drop(mapping.start, mapping.end)


def release_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Let go of the resident pages of those tensors that lie in mapped files.

    A later access reads them again. Other tensors are left as they are.
    """
    mappings = _mappings()
    for tensor in tensors:
        if _lies_in(tensor, mappings):
            start = tensor.data_ptr()
            # Whole pages only: the neighbours may be in use.
            _drop(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, start + tensor.nbytes)


def own(module: torch.nn.Module) -> None:
    """Copy those parameters and buffers that lie in mapped files into memory of their own.

    One at a time; the file is unmapped with the last.
    """
    mappings = _mappings()
    for tensor in [*module.parameters(), *module.buffers()]:
        if _lies_in(tensor, mappings):
            mapped = tensor.data
            tensor.data = mapped.clone()
            release_tensors([mapped])
            del mapped
    trim_heap()


def trim_heap() -> None:
    """Hand freed memory back to the system.

    The allocator keeps blocks of a few megabytes, and taken and freed in turn they lie in pieces.
    """
    if sys.platform == "linux" and hasattr(_libc(), "malloc_trim"):  # glibc has it, musl does not
        _libc().malloc_trim(0)


def _lies_in(tensor: torch.Tensor, mappings: list[_Mapping]) -> bool:
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return False
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return any(m.start <= start and end <= m.end for m in mappings)


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
