"""Turn a stranger's adapter folder into the files and the manifest of a version.

The canonical form is validated a second time, as written: what is stored is what was checked, even if
the folder changes meanwhile.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorary.errors import StorageError
from lorary.registry.base import BaseCard
from lorary.registry.blobs import Progress, copy_file, hash_file
from lorary.registry.canonical import content_digest, target_modules, write_canonical
from lorary.registry.durable import storage_errors
from lorary.registry.folder import CONFIG_FILE, TENSORS_FILE, AdapterFolder, scan_folder
from lorary.registry.manifest import Accepted, BaseIdentity, FileEntry, Manifest, Method, Task
from lorary.registry.validate import AdapterSpec, Limits, read_manifest, validate_files


def stage_version(
    folder: Path,
    staged: Path,
    *,
    name: str,
    base: BaseCard,
    description: str,
    accepted: Accepted,
    residual_base: bool,
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
        progress: told of bytes read.

    Returns:
        The version's manifest, complete but for its number.

    Raises:
        CorruptArtifact: see ``validate_files``.
        IncompatibleAdapter: see ``validate_files``.
        StorageError: a file cannot be read or written.
    """
    files = scan_folder(folder)
    limits = Limits(accepted=accepted, allow_dora=True, residual_base=residual_base)
    spec = validate_files(files, base, limits)
    manifest = read_manifest(files) if files.has_manifest else _new_manifest(spec, base)
    with storage_errors(f"write to {staged}"):
        write_canonical(files, spec, base, staged)
        for relative in files.kept:
            (staged / relative).parent.mkdir(exist_ok=True)
            copy_file(files.path / relative, staged / relative, progress)
    canonical = validate_files(scan_folder(staged), base, limits)
    entries = _entries(staged, files, progress)
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
        ),
        files=entries,
        accepted=accepted,
        description=description or manifest.description,
        method=dataclasses.replace(manifest.method, rank=canonical.rank),
    )


def _new_manifest(spec: AdapterSpec, base: BaseCard) -> Manifest:
    """Describe an adapter that was made elsewhere; the caller vouches for its base."""
    return Manifest(
        base=BaseIdentity(
            name=base.name, fingerprint=base.fingerprint, architecture=base.architecture
        ),
        method=Method(
            name="rslora" if spec.config.use_rslora else "lora",
            rank=spec.rank,
            alpha=spec.config.alpha,
            target_modules=tuple(target_modules(spec.modules, base)),
        ),
        task=Task(),
    )


def _entries(
    staged: Path, files: AdapterFolder, progress: Progress | None
) -> tuple[FileEntry, ...]:
    entries = []
    for relative in sorted((CONFIG_FILE, TENSORS_FILE, *files.kept)):
        path = staged / relative
        try:
            size, sha256 = path.stat().st_size, hash_file(path, progress)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        entries.append(FileEntry(path=relative, size=size, sha256=sha256))
    return tuple(entries)
