"""Commands about versions: push, pull, list, show, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.errors import CorruptArtifact, InvalidRequest, StorageError
from lorary.registry import cli_complete, cli_tables
from lorary.registry.address import DEFAULT_REGISTRY, is_hub
from lorary.registry.cli_base import base_folder_and_card
from lorary.registry.cli_options import (
    AllowZeroOption,
    JsonOption,
    MaxRatioOption,
    NameArgument,
    RefArgument,
    RegistryOption,
    ResidualBaseOption,
    open_registry,
)
from lorary.registry.cli_support import console, print_json, progress_bar, warn
from lorary.registry.folder import MANIFEST_FILE, REPORT_PAGE, read_bytes, scan_folder
from lorary.registry.manifest import MAX_RATIO, Manifest
from lorary.registry.refs import check_name

if TYPE_CHECKING:
    from lorary.registry.base import BaseCard
    from lorary.registry.results import Resolved, VersionInfo
    from lorary.registry.store import Registry


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT folder.")],
    name: NameArgument,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="Move this alias to it; may be repeated.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or name of its base; by default the one its manifest names."),
    ] = None,
    description: Annotated[str, typer.Option(help="A line for people.")] = "",
    allow_zero: AllowZeroOption = False,
    max_ratio: MaxRatioOption = MAX_RATIO,
    residual_base: ResidualBaseOption = False,
    originals: Annotated[
        bool | None,
        typer.Option(
            "--originals/--no-originals",
            help="Keep the files as given, too; by default those of other methods than LoRA.",
        ),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Validate an adapter and keep it as a version; equal content is the version it was."""
    check_name(name)
    files = scan_folder(folder)
    manifest = Manifest.from_json(read_bytes(files.manifest)) if files.has_manifest else None
    opened = open_registry(registry, create=True)
    card = find_card(manifest, base)
    size = files.tensors.stat().st_size
    # To a hub the bytes travel as well.
    with progress_bar("pushing", 2 * size if is_hub(registry) else size) as progress:
        info = opened.push(
            folder,
            name,
            base=card,
            aliases=alias or (),
            description=description,
            allow_zero=allow_zero,
            max_ratio=max_ratio,
            residual_base=residual_base,
            originals=originals,
            progress=progress,
        )
    if as_json:
        print_json(info)
    else:
        console().print(cli_tables.versions([info]))
        if files.left_out:
            typer.echo(f"left out: {', '.join(files.left_out)} (the base has its own)", err=True)


def pull(
    ref: RefArgument,
    dest: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Copy a version to a standard PEFT folder, every byte verified."""
    opened = open_registry(registry)
    resolved = opened.resolve(ref)
    info = opened.info(resolved)
    _warn_if_deprecated(info)
    with progress_bar("pulling", 2 * info.size_bytes) as progress:
        path = opened.pull(resolved, dest, progress)
    if as_json:
        print_json({"path": str(path), "version": info})
    else:
        console().print(f"{info.name}@{info.version} {info.digest} → {path}", highlight=False)


def list_versions(
    name: Annotated[
        str | None,
        typer.Argument(help="Only this adapter.", autocompletion=cli_complete.complete_name),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """List versions with their aliases and metrics."""
    opened = open_registry(registry)
    if name is not None:
        opened.aliases(check_name(name))
    infos = [info for info in opened.list() if name in (None, info.name)]
    for info in infos:
        if info.aliases:
            _warn_if_deprecated(info)
    if as_json:
        print_json(infos)
    else:
        console().print(cli_tables.versions(infos))


def show(
    ref: RefArgument, registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False
) -> None:
    """Show everything a version says about itself."""
    opened = open_registry(registry)
    resolved = opened.resolve(ref)
    info, manifest = opened.info(resolved), opened.manifest(resolved)
    _warn_if_deprecated(info)
    has_report = any(entry.path == REPORT_PAGE for entry in manifest.files)
    # From a hub it would have to be fetched, with everything else.
    report = _report_page(opened, resolved) if has_report and not is_hub(registry) else ""
    if as_json:
        print_json({"version": info, "manifest": manifest, "report": report or None})
    else:
        console().print(cli_tables.manifest(info, manifest, report))


def verify(
    ref: Annotated[
        str | None,
        typer.Argument(
            help="One version; without it, all.", autocompletion=cli_complete.complete_ref
        ),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Read every byte and compare it with what was promised; exit code 5 if anything differs."""
    opened = open_registry(registry)
    with progress_bar("verifying", None) as progress:
        report = opened.verify(ref, progress)
    if as_json:
        print_json({"is_ok": report.is_ok, "report": report})
    else:
        console().print(cli_tables.report(report))
    if not report.is_ok:
        bad = sum(bool(check.problem) for check in report.checks) + len(report.problems)
        raise CorruptArtifact(f"{bad} problems in {opened.url}; push those adapters again")


def find_card(manifest: Manifest | None, base: str | None) -> BaseCard:
    """Find the card of the base that is named, or that the manifest names."""
    name = base or (manifest.base.name if manifest else None)
    if name is None:
        raise InvalidRequest(
            f"the folder has no {MANIFEST_FILE} that names its base; name it with --base",
            field="base",
        )
    return base_folder_and_card(name)[1]


def _report_page(opened: Registry, resolved: Resolved) -> str:
    """Return where a version's report lies; empty where nothing can be unpacked."""
    try:
        return str(opened.locate(resolved) / REPORT_PAGE)
    except StorageError:
        return ""  # a registry on a read-only disk, which has only its blobs


def _warn_if_deprecated(info: VersionInfo) -> None:
    if info.deprecated:
        at = f", and {', '.join(info.aliases)} point there" if info.aliases else ""
        warn(f"{info.name}@{info.version} was deprecated {info.deprecated}{at}")
