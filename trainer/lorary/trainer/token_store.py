"""Rows of token ids on disk, for data that does not fit in memory.

One file of uint32, mapped into memory: a token's id, and its highest bit where the token is learned. The file has
no name, so nothing is left behind however the process ends, and the next run writes it anew. In memory stay
24 bytes a row; what the operating system keeps of the file it may drop at any time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from lorary.errors import StorageError
from lorary.home import lorary_home
from lorary.trainer.encoding import Row

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from lorary.trainer.kinds.kind import TokenRow

_LEARNED = 1 << 31


class StoredRows(Sequence[Row]):
    """Rows written once, to ``$LORARY_HOME``, and read at random.

    Args:
        placed: each row with its place; rows are read in the order of places, those of one place as given.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, placed: Iterable[tuple[int, Row]]) -> None:
        places: list[int] = []
        sizes: list[int] = []
        try:
            lorary_home().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=lorary_home()) as file:
                for place, row in placed:
                    ids = np.asarray(row.input_ids, dtype=np.uint32)
                    ids[np.asarray(row.is_learned())] |= _LEARNED
                    file.write(ids.tobytes())
                    places.append(place)
                    sizes.append(len(ids))
                file.flush()
                # The map outlives the closed file.
                empty = np.zeros(0, dtype=np.uint32)
                tokens = np.memmap(file, dtype=np.uint32, mode="r") if sizes else empty
        except OSError as error:
            raise StorageError(
                f"token rows cannot be kept in '{lorary_home()}': {error}. Free space, or set "
                "LORARY_HOME to another disk."
            ) from error
        order = np.argsort(np.asarray(places, dtype=np.int64), kind="stable")
        lengths = np.asarray(sizes, dtype=np.int64)
        self.lengths: NDArray[np.int64] = lengths[order]
        """Tokens of each row, int64 [N]."""
        self._starts = (np.cumsum(lengths) - lengths)[order]
        self._tokens: NDArray[np.uint32] = tokens

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        tokens = np.asarray(self._tokens[start : start + self.lengths[index]])
        is_learned = (tokens & _LEARNED) != 0
        # Where learned and read tokens change: read, learned, read, learned, …
        changes = np.flatnonzero(np.diff(is_learned)) + 1
        bounds = [int(i) for i in changes[1:]]
        if len(bounds) % 2:
            bounds.append(len(tokens))
        return Row(
            input_ids=tuple((tokens & (_LEARNED - 1)).tolist()),
            num_prompt=int(changes[0]),
            unlearned=tuple(zip(bounds[::2], bounds[1::2], strict=True)),
        )


def row_lengths(rows: Sequence[TokenRow]) -> list[int]:
    """Return the tokens of each row, without reading rows that know them."""
    known = getattr(rows, "lengths", None)
    return [len(row.input_ids) for row in rows] if known is None else list(map(int, known))
