"""Uploads by Xet, the way of the Hub's client where it has ``hf_xet``.

The client cuts files into chunks, packs new chunks into *xorbs*, sends those, and then a *shard* that says
which chunks of which xorbs make up each file. The hub keeps the xorbs and puts the files together at
once, so that everything else, and every other client, sees plain files of known sha256.

========================================  ====================================================
``GET  v1/chunks/default/…``              404: the hub knows no chunks of others
``POST v1/xorbs/default/{hash}``          kept as it is, once its chunks have been walked through
``POST v1/shards``                        files are put together and compared with their sha256
``GET  v1/reconstructions/{hash}``        which chunks make up a file, and where they are
``GET  xorbs/{hash}``                     a range of a xorb's bytes
========================================  ====================================================

Putting together is left to ``hf_xet`` itself, which asks this hub for the last two: it alone knows how
chunks are compressed. Clients remember for weeks which chunks a repository has and do not send them
again; so xorbs are kept, and a repository that was deleted and made again has another address here.

Layouts (little-endian; a hash is 32 bytes, shown as four 64-bit numbers in hex)::

    xorb    chunks, each: version u8, compressed length u24, scheme u8, length u24, then its bytes;
            after them, perhaps, an index that begins with "XETBLOB"
    shard   48 bytes of header, then files, each a row of 48 bytes: hash, flags u32, number of terms u32;
            per term: xorb's hash, flags u32, length u32, first chunk u32, last chunk + 1 u32;
            with flag 31 as many rows again to verify; with flag 30 a row that begins with the sha256;
            a row whose hash is all ones ends the list
"""

from __future__ import annotations

import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lorary.registry.blobs import hash_file
from lorary.registry.durable import make_folder, replace, storage_errors, unused_name, write_new
from lorary.registry.localhub.objects import SHA256
from lorary.registry.localhub.problems import HubProblem
from lorary.registry.localhub.repos import Repo

TOKEN_SECONDS: Final = 3600
MAX_XORB_BYTES: Final = 80 << 20
MAX_SHARD_BYTES: Final = 64 << 20
_MAX_FILE_BYTES: Final = 64 << 30
_ROW: Final = struct.Struct("<32sIIQ")
_TERM: Final = struct.Struct("<32sIIII")
_CHUNK_BYTES: Final = 8
_INDEX: Final = b"XETBLOB"
_VERIFIED: Final = 1 << 31
_HAS_SHA256: Final = 1 << 30
_END: Final = b"\xff" * 32
_ZERO: Final = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Chunks ``first`` to ``end`` (exclusive) of a xorb, which hold ``size`` bytes of a file."""

    xorb: str
    size: int
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class XetFile:
    """A file as a shard describes it."""

    hash: str
    sha256: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return sum(term.size for term in self.terms)


class XetStore:
    """The xorbs of one repository, and the files that wait to be put together."""

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self._folder = repo.folder / "xorbs"

    def xorb(self, name: str) -> Path:
        """Return where a xorb is.

        Raises:
            HubProblem: 404: it was not uploaded.
        """
        path = self._folder / _checked(name)
        if not path.is_file():
            raise HubProblem(404, f"xorb {name} was not uploaded to {self._repo.id}")
        return path

    def keep_xorb(self, name: str, content: bytes) -> bool:
        """Keep a xorb; tell whether it is new.

        Raises:
            HubProblem: 400: it is none.
        """
        target = self._folder / _checked(name)
        if target.exists():
            return False
        boundaries(content)
        with storage_errors("store a xorb"):
            make_folder(self._folder)
            staged = unused_name(self._repo.tmp, "xorb")
            write_new(staged, content)
            replace(staged, target)
        return True

    def reconstruction(self, file: XetFile, url: str) -> dict[str, Any]:
        """Say which chunks make up ``file``, and at what ranges of ``url`` (with ``{hash}``) they are."""
        rows, wanted = [], defaultdict(list)
        for term in file.terms:
            chunks = {"start": term.first, "end": term.end}
            rows.append({"hash": term.xorb, "unpacked_length": term.size, "range": chunks})
            wanted[term.xorb].append((term.first, term.end))
        places: dict[str, list[dict[str, Any]]] = {}
        for xorb, ranges in wanted.items():
            ends = boundaries(self.xorb(xorb).read_bytes())
            for first, end in _merged(ranges):
                if not 0 <= first < end < len(ends):
                    raise HubProblem(400, f"xorb {xorb} has no chunks {first} to {end}")
                place = {
                    "range": {"start": first, "end": end},
                    "url": url.format(hash=xorb),
                    "url_range": {"start": ends[first], "end": ends[end] - 1},
                }
                places.setdefault(xorb, []).append(place)
        return {"offset_into_first_range": 0, "terms": rows, "fetch_info": places}

    def put_together(self, file: XetFile, endpoint: str, token: str) -> None:
        """Make a plain file of chunks, and keep it if its sha256 is what the shard says.

        Args:
            file: from a shard.
            endpoint: where this hub answers for this repository's xorbs.
            token: that lets ``hf_xet`` read them.

        Raises:
            HubProblem: 400: chunks are missing, or the file is another.
        """
        blob = self._repo.blobs.path(file.sha256)
        if blob.is_file() and blob.stat().st_size == file.size:
            return
        staged = unused_name(self._repo.tmp, "xet")
        try:
            _fetch(file, endpoint, token, staged)
            with storage_errors("put a file together"):
                found = hash_file(staged)
            if found != file.sha256:
                raise HubProblem(400, f"the chunks make up sha256 {found}, not {file.sha256}")
            self._repo.blobs.put(staged, file.sha256)
        finally:
            staged.unlink(missing_ok=True)


def boundaries(xorb: bytes) -> list[int]:
    """Return where each chunk of a xorb begins, and where the last one ends.

    Raises:
        HubProblem: 400: the chunks do not fill it.
    """
    ends = [0]
    while ends[-1] < len(xorb) and not xorb.startswith(_INDEX, ends[-1]):
        at = ends[-1]
        if at + _CHUNK_BYTES > len(xorb) or xorb[at] != 0:
            raise HubProblem(400, "This is no xorb")
        ends.append(at + _CHUNK_BYTES + int.from_bytes(xorb[at + 1 : at + 4], "little"))
    if len(ends) < 2 or ends[-1] > len(xorb):
        raise HubProblem(400, "This is no xorb")
    return ends


def read_shard(shard: bytes) -> list[XetFile]:
    """Return the files that a shard describes.

    Raises:
        HubProblem: 400: it is none, or a file has no sha256.
    """
    try:
        return list(_files(shard))
    except (struct.error, IndexError):
        raise HubProblem(400, "This is no shard") from None


def _files(shard: bytes) -> Iterator[XetFile]:
    at = _ROW.size
    while True:
        raw, flags, count, _ = _ROW.unpack_from(shard, at)
        at += _ROW.size
        if raw == _END:
            return
        if count > (len(shard) - at) // _TERM.size:
            raise HubProblem(400, "This is no shard")
        terms = []
        for _ in range(count):
            xorb, _, size, first, end = _TERM.unpack_from(shard, at)
            terms.append(Term(xorb=_shown(xorb), size=size, first=first, end=end))
            at += _TERM.size
        if flags & _VERIFIED:
            at += count * _ROW.size
        if not flags & _HAS_SHA256:
            raise HubProblem(400, "A file of the shard has no sha256")
        sha256 = _shown(_ROW.unpack_from(shard, at)[0])
        at += _ROW.size
        file = XetFile(hash=_shown(raw), sha256=sha256, terms=tuple(terms))
        if file.size > _MAX_FILE_BYTES:
            raise HubProblem(413, f"files may have up to {_MAX_FILE_BYTES} bytes")
        yield file


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges that cover ``ranges`` and do not overlap, which ``hf_xet`` relies on."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def _fetch(file: XetFile, endpoint: str, token: str, target: Path) -> None:
    import hf_xet

    try:
        with _session().new_file_download_group(
            endpoint=endpoint,
            token=token,
            token_expiry_unix_secs=int(time.time()) + TOKEN_SECONDS,
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(file.hash, file.size), str(target))
    except (RuntimeError, OSError, ValueError) as error:
        raise HubProblem(400, f"a file cannot be put together from its chunks: {error}") from error


_session_lock = threading.Lock()
_sessions: list[Any] = []


def _session() -> Any:
    """Return the one session of this process."""
    import hf_xet

    with _session_lock:
        if not _sessions:
            _sessions.append(hf_xet.XetSession())
        return _sessions[0]


def _shown(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _checked(name: str) -> str:
    if not SHA256.fullmatch(name) or name == _ZERO:
        raise HubProblem(400, "a xorb is named by 64 hex digits")
    return name
