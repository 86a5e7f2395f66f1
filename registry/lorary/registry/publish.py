"""Turn a stranger's adapter folder into the files and the manifest of a version.

Another method than LoRA is written as LoRA first (``methods``), and what it was is kept in ``original/``.
The canonical form is validated a second time, as written: what is stored is what was checked, even if
the folder changes meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorary.errors import StorageError
from lorary.registry.base import BaseCard
from lorary.registry.blobs import Progress, copy_file, hash_file
from lorary.registry.canonical import content_digest, target_modules, write_canonical
from lorary.registry.durable import storage_errors, unused_name
from lorary.registry.folder import (
    CONFIG_FILE,
    ORIGINAL_FOLDER,
    TENSORS_FILE,
    AdapterFolder,
    scan_folder,
)
from lorary.registry.layouts import AdapterSpec
from lorary.registry.manifest import (
    Accepted,
    BaseIdentity,
    Conversion,
    FileEntry,
    Manifest,
    Method,
    Task,
)
from lorary.registry.methods.convert import convert, method_of
from lorary.registry.task_heads import kept_task
from lorary.registry.validate import (
    Limits,
    check_base,
    read_manifest,
    validate_files,
)


def stage_version(
    folder: Path,
    staged: Path,
    *,
    name: str,
    base: BaseCard,
    description: str,
    accepted: Accepted,
    residual_base: bool,
    originals: bool | None,
    progress: Progress | None,
) -> Manifest:
    """Validate ``folder`` and write a version's files to ``staged``.

    Args:
        folder: a PEFT folder, with or without ``manifest.json``.
        staged: an empty folder.
        name: the adapter.
        base: the base it was trained on.
        description: replaces the manifest's own, unless empty.
        accepted: what may pass though it is unusual; kept in the manifest.
        residual_base: ``base`` is the model that PiSSA or its kin left behind.
        originals: keep the files as they were given, in ``original/``; ``None``: only those that were
            another method than LoRA. They are not part of the digest.
        progress: told of bytes read.

    Returns:
        The version's manifest, complete but for its number.

    Raises:
        CorruptArtifact: see ``validate_files``.
        IncompatibleAdapter: see ``validate_files``.
        StorageError: a file cannot be read or written.
    """
    files = scan_folder(folder)
    manifest = read_manifest(files) if files.has_manifest else None
    limits = Limits(
        accepted=accepted,
        allow_dora=True,
        residual_base=residual_base,
        task=kept_task(manifest),
    )
    if manifest is not None:
        check_base(manifest, base)
    kept = files.kept
    with storage_errors(f"write to {staged}"), _as_lora(files, base, staged) as (plain, conversion):
        spec = validate_files(plain, base, limits)
        folding_error = write_canonical(plain, spec, base, staged)
        conversion = Conversion(
            source=conversion.source, max_error=max(conversion.max_error, folding_error)
        )
        for relative in kept:
            (staged / relative).parent.mkdir(exist_ok=True)
            copy_file(files.path / relative, staged / relative, progress)
        if originals or (originals is None and plain is not files):
            kept = (*kept, *_keep_originals(files, staged, progress))
    canonical = validate_files(scan_folder(staged), base, limits)
    if manifest is None:
        manifest = _new_manifest(spec, base, conversion)
    entries = _entries(staged, kept, progress)
    sha256s = {entry.path: entry.sha256 for entry in entries}
    return dataclasses.replace(
        manifest,
        name=name,
        version=0,
        digest=content_digest(
            base_fingerprint=base.fingerprint,
            task=manifest.task,
            config=sha256s[CONFIG_FILE],
            tensors=sha256s[TENSORS_FILE],
            tasks=manifest.tasks,
        ),
        files=entries,
        accepted=accepted,
        conversion=conversion,
        description=description or manifest.description,
        method=dataclasses.replace(
            manifest.method,
            rank=canonical.rank,
            invocation_tokens=canonical.config.invocation_tokens,
        ),
    )


@contextlib.contextmanager
def _as_lora(
    files: AdapterFolder, base: BaseCard, staged: Path
) -> Iterator[tuple[AdapterFolder, Conversion]]:
    """Give the adapter as LoRA: ``files`` itself, or a folder beside ``staged`` that is removed at the end."""
    method = method_of(files)
    if method is None:
        yield files, Conversion(source="LORA", max_error=0.0)
        return
    folder = unused_name(staged.parent, "converted")
    folder.mkdir()
    try:
        conversion = convert(method, files, base, folder)
        yield AdapterFolder(path=folder, has_manifest=False, kept=(), left_out=()), conversion
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_originals(
    files: AdapterFolder, staged: Path, progress: Progress | None
) -> tuple[str, ...]:
    (staged / ORIGINAL_FOLDER).mkdir()
    names = tuple(f"{ORIGINAL_FOLDER}/{name}" for name in (CONFIG_FILE, TENSORS_FILE))
    for name, source in zip(names, (files.config, files.tensors), strict=True):
        copy_file(source, staged / name, progress)
    return names


def _new_manifest(spec: AdapterSpec, base: BaseCard, conversion: Conversion) -> Manifest:
    """Describe an adapter that was made elsewhere; the caller vouches for its base."""
    name = conversion.source.lower()
    if spec.magnitudes or spec.config.use_rslora:
        name = "dora" if spec.magnitudes else "rslora"
    if spec.config.invocation_tokens:
        name = "alora"
    return Manifest(
        base=BaseIdentity(
            name=base.name, fingerprint=base.fingerprint, architecture=base.architecture
        ),
        method=Method(
            name=name,
            rank=spec.rank,
            alpha=spec.config.alpha,
            target_modules=tuple(target_modules(spec.modules, base)),
        ),
        task=Task(),
    )


def _entries(staged: Path, kept: Sequence[str], progress: Progress | None) -> tuple[FileEntry, ...]:
    entries = []
    for relative in sorted((CONFIG_FILE, TENSORS_FILE, *kept)):
        path = staged / relative
        try:
            size, sha256 = path.stat().st_size, hash_file(path, progress)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        entries.append(FileEntry(path=relative, size=size, sha256=sha256))
    return tuple(entries)
