"""What an attack is, and the honest adapter that every one of them begins as."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from lorary.errors import CorruptArtifact, IncompatibleAdapter, LoraryError
from lorary.registry.base import BaseCard
from lorary.registry.folder import CONFIG_FILE, MANIFEST_FILE, TENSORS_FILE
from lorary.registry.manifest import BaseIdentity, Manifest, Method, Task
from lorary.registry.safetensors_file import NUMPY_DTYPES, Array
from lorary.registry.tensor_layout import lora_key
from lorary.registry.values import product_norm

Kind = Literal["files", "header", "keys", "values", "config", "base"]
Tensors = dict[str, Array]

RANK: Final = 4
_ALPHA: Final = RANK
_RATIO: Final = 0.1
_DTYPE_NAMES: Final = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Victim:
    """A folder with an honest adapter of a base, for an attack to change.

    Attributes:
        path: the folder.
        card: the base.
    """

    path: Path
    card: BaseCard

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
        """The adapter's manifest."""
        return self.path / MANIFEST_FILE

    @property
    def modules(self) -> list[str]:
        """The modules that the adapter changes: one in every layer, the smallest there is."""
        smallest = min(self.card.modules, key=lambda m: (np.prod(self.card.modules[m]), m))
        last = smallest.rpartition(".")[2]
        return sorted(m for m in self.card.modules if m.rpartition(".")[2] == last)

    def honest_tensors(self) -> Tensors:
        """Return A and B of every module; each change is a tenth of its weight in norm."""
        generator = np.random.default_rng(0)
        tensors: Tensors = {}
        for module in self.modules:
            rows, columns = self.card.modules[module]
            a = generator.standard_normal((RANK, columns)).astype(np.float32)
            b = generator.standard_normal((rows, RANK)).astype(np.float32)
            size = product_norm(b, a) * _ALPHA / RANK
            b *= np.float32(_RATIO * self.card.norms.get(module, 1.0) / size)
            tensors |= {lora_key(module, "A"): a, lora_key(module, "B"): b}
        return tensors

    def honest_config(self) -> dict[str, Any]:
        """Return the configuration that fits ``honest_tensors``."""
        return {
            "base_model_name_or_path": self.card.name,
            "bias": "none",
            "lora_alpha": _ALPHA,
            "peft_type": "LORA",
            "r": RANK,
            "target_modules": sorted({m.rpartition(".")[2] for m in self.modules}),
            "task_type": "CAUSAL_LM",
        }

    def honest_manifest(self) -> Manifest:
        """Return the manifest that a trainer on this base would write."""
        card = self.card
        return Manifest(
            base=BaseIdentity(
                name=card.name, fingerprint=card.fingerprint, architecture=card.architecture
            ),
            method=Method(
                name="lora",
                rank=RANK,
                alpha=_ALPHA,
                target_modules=tuple(self.honest_config()["target_modules"]),
            ),
            task=Task(),
            created_at="2026-01-01T00:00:00Z",
        )

    def write_honest(self) -> None:
        """Make the folder and write the honest adapter."""
        self.path.mkdir(parents=True)
        self.set_config()
        self.set_tensors(self.honest_tensors())
        self.manifest.write_text(self.honest_manifest().to_json())

    def set_config(self, **changes: Any) -> None:
        """Write the honest configuration with some keys changed."""
        self.config.write_text(json.dumps({**self.honest_config(), **changes}))

    def set_tensors(self, tensors: Mapping[str, Array]) -> None:
        """Write well-formed safetensors."""
        header: dict[str, Any] = {}
        data = bytearray()
        for name, array in tensors.items():
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()
            header[name] = {
                "dtype": _DTYPE_NAMES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
        self.set_raw(header, bytes(data))

    def set_raw(self, header: object, data: bytes = b"", *, length: int | None = None) -> None:
        """Write any header before any data, right or wrong.

        Args:
            header: bytes as they are, or what becomes JSON.
            data: what follows.
            length: the header's length as the file claims it; the true one if not given.
        """
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        claimed = len(raw) if length is None else length
        self.tensors.write_bytes(claimed.to_bytes(8, "little") + raw + data)

    def header_and_data(self) -> tuple[dict[str, Any], bytes]:
        """Return the honest file in its two parts."""
        raw = self.tensors.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One way to hurt whoever loads an adapter.

    Attributes:
        name: a slug, unique; the folder's name in a written corpus.
        kind: what must notice it: the list of files, the tensors' header, their names and shapes, their
            values, the configuration, or the comparison with the base.
        what: what it is, and what it does to a loader that takes it.
        error: the class that Lorary refuses it with.
        says: a part of the message, which names the reason.
        change: turns an honest adapter into the attack.
        only_at_push: what a registry's own folders may be, a stranger's may not (hard links).
    """

    name: str
    kind: Kind
    what: str
    says: str
    change: Callable[[Victim], None] = field(repr=False, compare=False)
    error: type[LoraryError] = CorruptArtifact
    only_at_push: bool = False

    def write(self, path: Path, card: BaseCard) -> Path:
        """Make the folder ``path`` and write the attack on ``card`` into it."""
        victim = Victim(path, card)
        victim.write_honest()
        self.change(victim)
        return path


def misfit(kind: Kind, name: str, what: str, says: str, change: Callable[[Victim], None]) -> Attack:
    """Return an attack that is well-formed, but not for this base or server."""
    return Attack(
        name=name, kind=kind, what=what, says=says, change=change, error=IncompatibleAdapter
    )


def corrupt(
    kind: Kind, name: str, what: str, says: str, change: Callable[[Victim], None]
) -> Attack:
    """Return an attack whose files contradict themselves or are not what they claim."""
    return Attack(name=name, kind=kind, what=what, says=says, change=change)
