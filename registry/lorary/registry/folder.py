"""Which files an adapter folder may hold, checked by name and by their first bytes.

The folder comes from somebody else. Nothing but plain files with plain names is read; a file whose
first bytes are those of a pickle, an archive or a program is refused whatever it is called.

=========================================  ==========================================
``adapter_config.json``                    needed
``adapter_model.safetensors``              needed
``manifest.json``                          written by the trainer or the registry
``README.md``, ``report/…``                kept with the version
``original/…``                             what a version was made of; left out of another push
tokenizer files, ``.gitattributes``,       left out: the base has its own tokenizer,
``.cache/``, ``.lorary/``                  and the rest is a downloader's or a Hub's
=========================================  ==========================================
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, cast

from lorary.errors import CorruptArtifact, LoraryError, StorageError
from lorary.registry.findings import Report, attempt, refuse
from lorary.registry.strict_json import show
from lorary.registry.tokenizer_files import TOKENIZER_FILES

CONFIG_FILE: Final = "adapter_config.json"
TENSORS_FILE: Final = "adapter_model.safetensors"
MANIFEST_FILE: Final = "manifest.json"
README_FILE: Final = "README.md"
REPORT_FOLDER: Final = "report"
REPORT_PAGE: Final = f"{REPORT_FOLDER}/report.html"
ORIGINAL_FOLDER: Final = "original"

MAX_FILES: Final = 256
MAX_TENSORS_BYTES: Final = 8 << 30
MAX_JSON_BYTES: Final = 4 << 20
MAX_OTHER_BYTES: Final = 64 << 20

_REPORT_SUFFIXES: Final = frozenset(
    {".csv", ".html", ".json", ".jsonl", ".md", ".png", ".svg", ".txt"}
)
_LEFT_OUT: Final = frozenset({".cache", ".gitattributes", ".lorary", *TOKENIZER_FILES})
_ORIGINALS: Final = tuple(f"{ORIGINAL_FOLDER}/{name}" for name in (CONFIG_FILE, TENSORS_FILE))
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_MAGIC: Final = (
    (b"PK\x03\x04", "a zip archive (or a PyTorch checkpoint)"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"\xcf\xfa\xed\xfe", "a program"),
    (b"#!", "a script"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\x93NUMPY", "a NumPy file, which may hold pickles"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
)
# A pickle starts with \x80 and its protocol number.
_PICKLE_MARK: Final = 0x80
_PICKLE_PROTOCOLS: Final = range(2, 6)
_HEAD_BYTES: Final = 16
_SAFETENSORS_BRACE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """A folder whose file list has been checked; contents have not.

    Attributes:
        path: the folder.
        has_manifest: whether there is a ``manifest.json``.
        kept: POSIX paths of the further files that a version keeps (README, report).
        left_out: names of files that a version does not keep.
    """

    path: Path
    has_manifest: bool
    kept: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def config(self) -> Path:
        """The adapter's configuration."""
        return self.path / CONFIG_FILE

    @property
    def tensors(self) -> Path:
        """The adapter's weights."""
        return self.path / TENSORS_FILE

    @property
    def manifest(self) -> Path:
        """The manifest, which may be absent."""
        return self.path / MANIFEST_FILE


def scan_folder(path: Path, *, allow_hardlinks: bool = False) -> AdapterFolder:
    """Check names, kinds, sizes and first bytes of all files in ``path``; read nothing else.

    Args:
        path: the folder.
        allow_hardlinks: for folders inside a registry, which shares equal files by hard links. In a
            folder of a stranger a hard link may be somebody else's private file.

    Raises:
        CorruptArtifact: a file that may not be there, or that is not what its name claims.
        StorageError: the folder does not exist or cannot be read.
    """
    found = examine_folder(path, refuse, allow_hardlinks=allow_hardlinks)
    return cast("AdapterFolder", found)  # `refuse` raises where there would be none


def examine_folder(
    path: Path, report: Report, *, allow_hardlinks: bool = False
) -> AdapterFolder | None:
    """Do ``scan_folder`` and report everything that is wrong; ``None`` if a needed file cannot be used.

    Raises:
        StorageError: the folder does not exist or cannot be read.
    """
    path = Path(path)
    kept: list[str] = []
    left_out: list[str] = []
    found: set[str] = set()
    unusable: set[str] = set()

    def report_entry(problem: LoraryError) -> None:
        unusable.add(relative)
        report(problem)

    for entry, relative in _walk(path, left_out, report):
        attempt(
            report_entry,
            functools.partial(_check_entry, entry, relative, allow_hardlinks=allow_hardlinks),
        )
        if relative in unusable:
            continue
        if relative in (CONFIG_FILE, TENSORS_FILE, MANIFEST_FILE):
            found.add(relative)
        elif relative in _LEFT_OUT or relative in _ORIGINALS:
            left_out.append(relative)
        else:
            kept.append(relative)
        if len(found) + len(kept) + len(left_out) > MAX_FILES:
            report(CorruptArtifact(f"{path} has more than {MAX_FILES} files"))
            break
    for needed in (CONFIG_FILE, TENSORS_FILE):
        if needed not in found | unusable:
            report(
                CorruptArtifact(
                    f"{path} has no {needed}; a PEFT adapter saved as safetensors has one "
                    "(save_pretrained(..., safe_serialization=True))"
                )
            )
    if not {CONFIG_FILE, TENSORS_FILE} <= found:
        return None
    return AdapterFolder(
        path=path,
        has_manifest=MANIFEST_FILE in found,
        kept=tuple(sorted(kept)),
        left_out=tuple(sorted(left_out)),
    )


def read_bytes(path: Path) -> bytes:
    """Read a small file.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _walk(
    path: Path, left_out: list[str], report: Report
) -> Iterator[tuple[os.DirEntry[str], str]]:
    for entry in _entries(path, report):
        if entry.is_symlink() or not entry.is_dir(follow_symlinks=False):
            yield entry, entry.name
        elif entry.name in (REPORT_FOLDER, ORIGINAL_FOLDER):
            for inner in _entries(Path(entry.path), report):
                yield inner, f"{entry.name}/{inner.name}"
        elif entry.name in _LEFT_OUT:
            left_out.append(f"{entry.name}/")
        else:
            report(
                CorruptArtifact(
                    f"folder {show(entry.name)} may not be in an adapter folder; "
                    f"only {REPORT_FOLDER}/ may. Push a folder that holds the adapter alone."
                )
            )


def _entries(path: Path, report: Report) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise StorageError(f"no such adapter folder: {path}") from error
    except OSError as error:
        raise StorageError(f"cannot read adapter folder {path}: {error.strerror}") from error
    folded = [entry.name.casefold() for entry in listed]
    if len(set(folded)) != len(folded):
        report(CorruptArtifact(f"{path} has names that differ only in case"))
    return listed


def _check_entry(entry: os.DirEntry[str], relative: str, *, allow_hardlinks: bool) -> None:
    if relative not in _LEFT_OUT and not _is_allowed(relative):
        raise CorruptArtifact(
            f"file {show(relative)} may not be in an adapter folder; allowed are {CONFIG_FILE}, "
            f"{TENSORS_FILE}, {MANIFEST_FILE}, {README_FILE}, tokenizer files and {REPORT_FOLDER}/"
        )
    info = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(info.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "not a plain file"
        raise CorruptArtifact(
            f"file {show(relative)} is {kind}; copy the real file into the folder"
        )
    if info.st_nlink > 1 and not allow_hardlinks:
        raise CorruptArtifact(
            f"file {show(relative)} has {info.st_nlink} hard links; it may be another file under a "
            "second name. Copy it into the folder."
        )
    if info.st_mode & (stat.S_ISUID | stat.S_ISGID):
        raise CorruptArtifact(f"file {show(relative)} has the set-user or set-group bit")
    limit = _size_limit(relative)
    if info.st_size > limit:
        raise CorruptArtifact(
            f"file {show(relative)} has {info.st_size} bytes; the limit is {limit}"
        )
    _check_magic(Path(entry.path), relative)


def _is_allowed(relative: str) -> bool:
    pure = PurePosixPath(relative)
    if not all(_PART.fullmatch(part) for part in pure.parts):
        return False
    if pure.parts[0] == REPORT_FOLDER and len(pure.parts) > 1:
        return pure.suffix in _REPORT_SUFFIXES
    return relative in (CONFIG_FILE, TENSORS_FILE, MANIFEST_FILE, README_FILE, *_ORIGINALS)


def _size_limit(relative: str) -> int:
    name = PurePosixPath(relative).name
    if name == TENSORS_FILE:
        return MAX_TENSORS_BYTES
    return MAX_JSON_BYTES if name in (CONFIG_FILE, MANIFEST_FILE) else MAX_OTHER_BYTES


def _check_magic(file: Path, relative: str) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            head = os.read(descriptor, _HEAD_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from error
    if (
        PurePosixPath(relative).name == TENSORS_FILE
        and head[_SAFETENSORS_BRACE : _SAFETENSORS_BRACE + 1] == b"{"
    ):
        return  # the first eight bytes are a length, which may look like anything
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if len(head) > 1 and head[0] == _PICKLE_MARK and head[1] in _PICKLE_PROTOCOLS:
        kind = "a pickle, which can run code"
    if kind is not None:
        raise CorruptArtifact(f"file {show(relative)} is {kind}, not what its name says")
