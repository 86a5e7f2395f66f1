"""Rows of a data set on a Hub, through the ``datasets`` library.

The library downloads a data set once into its own cache, as Arrow files that it maps into memory, so
a set of any size may be read; a folder that it understands is read in place of an id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe, MissingDependency, RegistryUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorary.trainer.recipe import DataRecipe


class HubRows:
    """One split of a data set; may be iterated again and again.

    Raises:
        MissingDependency: ``datasets`` is not installed.
        InvalidRecipe: no such data set, subset or split.
        RegistryUnavailable: the Hub cannot be reached, and the set is not in the cache.
    """

    def __init__(self, recipe: DataRecipe) -> None:
        self._name = f"{recipe.path}[{recipe.split}]"
        self._rows = _load(recipe)

    @property
    def num_bytes(self) -> int:
        """The size of the rows in Arrow's form."""
        return int(self._rows.data.nbytes)

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, row in enumerate(self._rows, start=1):
            yield f"'{self._name}' row {number}", row


def _load(recipe: DataRecipe) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            "data.source 'hub' needs 'datasets', which is not installed. "
            "Run: pip install 'lorary[data]'"
        ) from error
    what = f"data set '{recipe.path}'"
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            recipe.path,
            recipe.subset or None,
            split=recipe.split,
            revision=recipe.revision or None,
        )
    except (datasets.exceptions.DatasetNotFoundError, ValueError, FileNotFoundError) as error:
        raise InvalidRecipe(
            f"{what} cannot be read: {error} Set data.path, data.subset or data.split."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise RegistryUnavailable(
            f"{what} is not in the cache and the Hub cannot be reached: {error} "
            "Connect, or use data.source 'file'."
        ) from error
