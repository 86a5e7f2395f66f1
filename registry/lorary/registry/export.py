"""Give a version to others: as a PEFT folder, as a GGUF LoRA for llama.cpp, or as a whole merged model.

Whatever is written is complete before it has its name, and the version is validated against the base
that it is written for.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lorary.errors import IncompatibleAdapter, MissingDependency
from lorary.registry.base import BaseCard
from lorary.registry.durable import storage_errors, sync_folder, unused_name
from lorary.registry.folder import AdapterFolder, scan_folder
from lorary.registry.gguf_lora import write_gguf
from lorary.registry.layouts import AdapterSpec
from lorary.registry.pull import check_free
from lorary.registry.results import Resolved
from lorary.registry.store import Registry
from lorary.registry.validate import Limits, validate_files

Form = Literal["peft", "gguf", "merged"]
FORMS: Final[tuple[Form, ...]] = ("peft", "gguf", "merged")
Dtype = Literal["bfloat16", "float16"]
DTYPES: Final[tuple[Dtype, ...]] = ("bfloat16", "float16")
GGUF_FILE: Final = "adapter.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the folder.
        form: of it.
        version: ``name@3``.
        digest: of the version.
        deviation: of a merged model: its logits beside those of base and adapter unmerged
            (``lorary.bases.adapted.Deviation``).
    """

    path: str
    form: Form
    version: str
    digest: str
    deviation: Any = None


def export_gguf(
    registry: Registry, resolved: Resolved, base: Path, card: BaseCard, dest: Path
) -> ExportReport:
    """Write ``adapter.gguf`` into a new folder; llama.cpp takes it with ``--lora``.

    Args:
        registry: where the version is.
        resolved: the version.
        base: folder of its base.
        card: of the base.
        dest: a folder that is missing or empty.

    Raises:
        AlreadyExists: ``dest`` is not empty.
        IncompatibleAdapter: another base, DoRA, or an architecture whose layout is not known.
        MissingDependency: the ``gguf`` package is not installed.
        StorageError: ``dest`` cannot be written.
    """
    name = f"{resolved.name}@{resolved.version}"
    files, spec = _checked(registry, resolved, card, allow_dora=False)
    with _appearing(dest) as staged:
        write_gguf(files, spec, card, base, staged / GGUF_FILE, name=name)
    return ExportReport(path=str(dest), form="gguf", version=name, digest=resolved.digest)


def export_merged(
    registry: Registry,
    resolved: Resolved,
    base: Path,
    card: BaseCard,
    dest: Path,
    *,
    dtype: Dtype = "bfloat16",
) -> ExportReport:
    """Write base and adapter as one model of 16-bit weights into a new folder, with its tokenizer.

    How far its logits are from those of the adapter beside the base is measured, and kept in
    ``merge-report.json``. DoRA is merged as well.

    Args:
        registry: where the version is.
        resolved: the version.
        base: folder of its base.
        card: of the base.
        dest: a folder that is missing or empty.
        dtype: of the weights.

    Raises:
        AlreadyExists: ``dest`` is not empty.
        IncompatibleAdapter: another base, or an aLoRA.
        CorruptArtifact: the merged weights are beyond ``dtype``.
        MissingDependency: torch, transformers or peft are not installed.
        StorageError: ``dest`` cannot be written.
    """
    files, spec = _checked(registry, resolved, card, allow_dora=True)
    if spec.config.invocation_tokens:
        raise IncompatibleAdapter(
            f"'{resolved.name}@{resolved.version}' is an aLoRA: it is the base up to its invocation and the "
            "adapter from there on, which no weights are. Export it --to peft or --to gguf"
        )
    try:
        adapted = importlib.import_module("lorary.bases.adapted")
    except ImportError as error:
        raise MissingDependency(
            f"merging needs {error.name or error}: pip install 'lorary[train]'"
        ) from error
    with _appearing(dest) as staged:
        deviation = adapted.merge_adapter(base, files.path, staged, dtype=dtype)
    return ExportReport(
        path=str(dest),
        form="merged",
        version=f"{resolved.name}@{resolved.version}",
        digest=resolved.digest,
        deviation=deviation,
    )


def _checked(
    registry: Registry, resolved: Resolved, card: BaseCard, *, allow_dora: bool
) -> tuple[AdapterFolder, AdapterSpec]:
    """Fetch a version and check it against the base; what its push let pass passes."""
    files = scan_folder(registry.fetch(resolved), allow_hardlinks=True)
    return files, validate_files(files, card, Limits(accepted=None, allow_dora=allow_dora))


@contextmanager
def _appearing(dest: Path) -> Iterator[Path]:
    """Give a folder that becomes ``dest`` at the end, or is removed if there is an error."""
    dest = dest.absolute()
    check_free(dest)
    with storage_errors(f"write {dest}"):
        dest.parent.mkdir(parents=True, exist_ok=True)
        staged = unused_name(dest.parent, f".{dest.name}.tmp")
        staged.mkdir()
        try:
            yield staged
            staged.rename(dest)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        sync_folder(dest.parent)
