"""The weights of a base's linear layers as its files have them, whatever they were rounded to for serving."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Self

from lorary.errors import NotMergeable
from lorary.registry.base import stored_weights

if TYPE_CHECKING:
    from pathlib import Path

    import torch

# Names of safetensors. FP8 checkpoints keep scales of blocks beside the weight, which alone says nothing.
_WHOLE: Final = frozenset({"F64", "F32", "F16", "BF16"})


class GoldenWeights:
    """Reads weights from a base's files, which are open while the ``with`` block lasts.

    The files are mapped, so what is read is the system's page cache and not memory of the process.

    Args:
        folder: of the base.

    Raises:
        BaseNotFound, CorruptArtifact, StorageError: as ``BaseCard.from_folder``.
    """

    def __init__(self, folder: Path) -> None:
        self._stored = stored_weights(folder)
        self._files: dict[Path, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.clear()
        self._open.close()

    def read(self, module: str) -> torch.Tensor:
        """Return a linear module's weight, float32 [out, in]; not to be changed in place.

        Raises:
            NotMergeable: the files have no such weight, or only in 8 bits.
        """
        from safetensors import safe_open

        stored = self._stored.get(module)
        if stored is None or stored.dtype not in _WHOLE:
            kept = "no weight of that name" if stored is None else f"it only as {stored.dtype}"
            raise NotMergeable(
                f"module {module}: the base's files have {kept}, so nothing can be folded into it; use "
                "execution BATCHED."
            )
        file = self._files.get(stored.file)
        if file is None:
            opened = safe_open(stored.file, framework="pt")
            file = self._files[stored.file] = self._open.enter_context(opened)
        weight: torch.Tensor = file.get_tensor(stored.key).float()
        return weight.t() if stored.is_transposed else weight
