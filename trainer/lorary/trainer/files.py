"""Rows of a local file, one at a time, each with the place it came from.

===========  ==================================================  =================
ending       a row                                               memory
===========  ==================================================  =================
``.jsonl``   an object a line                                    a line
``.csv``     a record below the header                           a record
``.parquet``  a record; needs ``pyarrow``                        a row group's batch
``.txt``     a line, or a paragraph, as the column ``text``      a line or paragraph
``.json``    an object of one list                               the whole file
===========  ==================================================  =================
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lorary.trainer.recipe import DataRecipe

    Located = tuple[str, Mapping[str, Any]]

# One field of a CSV may hold a whole article; the module's own limit is 128 KiB.
MAX_FIELD = 1 << 24
_MAX_JSON_BYTES = 512 << 20
_BATCH_ROWS = 1024


def file_rows(recipe: DataRecipe) -> Iterator[Located]:
    """Yield ``(place, row)`` of ``recipe.path``; the place is what messages say, ``'a.csv' line 3``.

    Raises:
        InvalidRecipe: the file is missing, of an unknown kind, or has a bad line.
        MissingDependency: a Parquet file without ``pyarrow``.
    """
    path = Path(recipe.path)
    readers: dict[str, Callable[[Path], Iterator[Located]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
        ".txt": _paragraphs if recipe.text_unit == "paragraph" else _lines,
    }
    if path.suffix not in readers:
        endings = ", ".join(readers)
        raise InvalidRecipe(f"data.path is '{path}'; it must end in one of {endings}.")
    if not path.is_file():
        raise InvalidRecipe(f"data.path is '{path}'; there is no such file.")
    return readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[Located]:
    """Yield an object a line; blank lines are skipped, a byte-order mark is accepted."""
    for number, raw in _numbered(path):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except ValueError as error:
            raise InvalidRecipe(f"'{path}' line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise InvalidRecipe(f"'{path}' line {number} is not a JSON object.")
        yield f"'{path}' line {number}", row


def _json(path: Path) -> Iterator[Located]:
    """Yield the objects of a file that is one list."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InvalidRecipe(
            f"'{path}' is larger than {_MAX_JSON_BYTES >> 20} MiB, and a .json file is read whole. "
            "Write it as .jsonl, an object a line."
        )
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidRecipe(
            f"'{path}' is not JSON: {error}. If it has an object a line, name it .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise InvalidRecipe(f"'{path}' is not a list of objects; write it as one, or as .jsonl.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InvalidRecipe(f"'{path}' item {number} is not a JSON object.")
        yield f"'{path}' item {number}", row


def _csv(path: Path) -> Iterator[Located]:
    """Yield the records of a CSV with a header."""
    csv.field_size_limit(MAX_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidRecipe(
                        f"'{path}' line {reader.line_num} has another number of fields than the "
                        "header."
                    )
                yield f"'{path}' line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidRecipe(f"'{path}' line {reader.line_num} is not CSV: {error}.") from error


def _parquet(path: Path) -> Iterator[Located]:
    """Yield the records of a Parquet file, numbered from 1."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency(
            f"'{path}' is a Parquet file, which needs 'pyarrow'. Run: pip install 'lorary[data]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"'{path}' row {number}", row
    except pyarrow.ArrowException as error:
        raise InvalidRecipe(f"'{path}' is not a whole Parquet file: {error}.") from error


def _lines(path: Path) -> Iterator[Located]:
    """Yield every line that is not blank as ``{"text": …}``."""
    for number, raw in _numbered(path):
        text = _decoded(raw, path, number).strip()
        if text:
            yield f"'{path}' line {number}", {"text": text}


def _paragraphs(path: Path) -> Iterator[Located]:
    """Yield lines up to the next blank one, joined, as ``{"text": …}``."""
    lines: list[str] = []
    start = 0
    for number, raw in _numbered(path):
        line = _decoded(raw, path, number).rstrip()
        if line and not lines:
            start = number
        if line:
            lines.append(line)
        elif lines:
            yield f"'{path}' line {start}", {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield f"'{path}' line {start}", {"text": "\n".join(lines)}


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line), without the byte-order mark that some editors write."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRecipe(f"'{path}' line {number} is not UTF-8: {error}.") from error
