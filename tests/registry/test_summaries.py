"""Lists are read from one file per adapter, which is never believed where the files themselves changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lorary.errors import IncompatibleAdapter
from lorary.registry import Registry
from lorary.registry.folding import _PIECE, fold
from lorary.registry.safetensors_file import NUMPY_DTYPES, is_finite

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


def test_lists_are_the_same_with_and_without_summaries(
    forge: Forge, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card, aliases=["prod"])
    file = Path(registry.url.removeprefix("file://")) / "adapters" / "a" / "summaries.jsonl"
    listed = registry.list()
    lines = file.read_bytes()
    assert [info.aliases for info in listed] == [(), ("prod",)]
    opened: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            "lorary.registry.unpacked.VersionFolders.manifest",
            lambda _, pointer: opened.append(pointer.version),
        )
        assert Registry.open(registry.url).list() == listed
    assert opened == []
    for raw in (b"", b"{", b"[]\n", lines[:-9], b'{"pointer": {}, "summary": {}}\n'):
        file.write_bytes(raw)
        assert Registry.open(registry.url).list() == listed
    file.unlink()
    registry.push(forge.folder("3", seed=3), "a", base=forge.card)
    assert file.read_bytes().splitlines()[:2] == lines.splitlines()  # all of them, made again
    file.write_bytes(lines[:-9])
    registry.push(forge.folder("4", seed=4), "a", base=forge.card)
    assert [info.version for info in Registry.open(registry.url).list()] == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("scale", [2.0, 0.25, 1 / 3, -1.7])
def test_folding_in_pieces_is_folding_at_once(dtype: str, scale: float) -> None:
    values = np.random.default_rng(0).standard_normal((3, _PIECE // 2 + 5))
    b = values.astype(NUMPY_DTYPES[dtype])
    folded, error = fold("b", b, scale)
    exact = b.astype(np.float64) * scale
    fits = np.array_equal(exact.astype(b.dtype).astype(np.float64), exact)
    assert folded.dtype == (b.dtype if fits else np.float32)
    assert np.array_equal(folded, exact.astype(folded.dtype))
    assert error == pytest.approx(
        np.linalg.norm(folded.astype(np.float64) - exact) / np.linalg.norm(exact), rel=1e-6
    )


def test_what_is_beyond_float32_is_refused_in_any_piece() -> None:
    b = np.ones(2 * _PIECE + 3, np.float32)
    b[-1] = 3e38
    for scale in (2.0, 1.5):
        with pytest.raises(IncompatibleAdapter, match="beyond float32"):
            fold("b", b, scale)
    assert is_finite(b)
    b[-1] = np.inf
    assert not is_finite(b)
    tiny = np.full(3, 1e-45, np.float32)  # half of it is no float32: rounded, and said so
    assert fold("b", tiny, 0.5)[1] > 0
