"""The ``registry`` command: push, pull, list, show, log, alias, promote, rollback, verify."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorary.errors import CorruptArtifact, InvalidRequest, LoraryError, MissingDependency
from lorary.registry import cli_canary, cli_tables
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.aliases import UNSET, AliasMove, Unset
from lorary.registry.cli_support import console, print_json, progress_bar, run
from lorary.registry.folder import MANIFEST_FILE, read_bytes, scan_folder
from lorary.registry.manifest import Manifest
from lorary.registry.refs import check_name, parse_ref, parse_selector

if TYPE_CHECKING:
    from lorary.registry.base import BaseCard
    from lorary.registry.store import Registry

app = typer.Typer(
    name="registry",
    help="Keep adapters as immutable, numbered, verified versions, with movable aliases.\n\n"
    "A ref is [bold]name[/] (the newest version), [bold]name@prod[/] (an alias), [bold]name@3[/] "
    "(a version) or [bold]name@sha256:ab12…[/] (a digest).",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RegistryOption = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="LORARY_REGISTRY",
        metavar="URL",
        help="file:///path, a path, or hf://owner.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Kept in the log.")]
RefArgument = Annotated[str, typer.Argument(metavar="REF", help="name, name@prod, name@3 …")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name.")]


@app.command(epilog="Example: registry push runs/sentiment sentiment --alias prod")
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
    allow_zero: Annotated[
        bool, typer.Option("--allow-zero", help="Accept an adapter that changes nothing.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Validate an adapter and keep it as a version; equal content is the version it was."""
    check_name(name)
    files = scan_folder(folder)
    manifest = Manifest.from_json(read_bytes(files.manifest)) if files.has_manifest else None
    opened = _open(registry, create=True)
    card = _card(manifest, base)
    with progress_bar("hashing", files.tensors.stat().st_size) as progress:
        info = opened.push(
            folder,
            name,
            base=card,
            aliases=alias or (),
            description=description,
            allow_zero=allow_zero,
            progress=progress,
        )
    if as_json:
        print_json(info)
    else:
        console().print(cli_tables.versions([info]))
        if files.left_out:
            typer.echo(f"left out: {', '.join(files.left_out)} (the base has its own)", err=True)


@app.command(epilog="Example: registry pull sentiment@prod ./sentiment")
def pull(
    ref: RefArgument,
    dest: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Copy a version to a standard PEFT folder, every byte verified."""
    opened = _open(registry)
    resolved = opened.resolve(ref)
    info = opened.info(resolved)
    exact = parse_ref(f"{info.name}@{info.version}")
    with progress_bar("pulling", 2 * info.size_bytes) as progress:
        path = opened.pull(exact, dest, progress)
    if as_json:
        print_json({"path": str(path), "version": info})
    else:
        console().print(f"{info.name}@{info.version} {info.digest} → {path}", highlight=False)


@app.command("list", epilog="Example: registry list --json")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="Only this adapter.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """List versions with their aliases and metrics."""
    opened = _open(registry)
    if name is not None:
        opened.resolve(check_name(name))
    infos = [info for info in opened.list() if name in (None, info.name)]
    if as_json:
        print_json(infos)
    else:
        console().print(cli_tables.versions(infos))


@app.command(epilog="Example: registry show sentiment@prod")
def show(
    ref: RefArgument, registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False
) -> None:
    """Show everything a version says about itself."""
    opened = _open(registry)
    resolved = opened.resolve(ref)
    info, manifest = opened.info(resolved), opened.manifest(resolved)
    if as_json:
        print_json({"version": info, "manifest": manifest})
    else:
        console().print(cli_tables.manifest(info, manifest))


@app.command(epilog="Example: registry log sentiment --alias prod")
def log(
    name: NameArgument,
    alias: Annotated[str | None, typer.Option(help="Only this alias.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show who moved which alias, when and why."""
    moves = _open(registry).log(name, alias)
    if as_json:
        print_json(moves)
    else:
        console().print(cli_tables.moves(moves))


@app.command(epilog="Example: registry alias sentiment prod @3 --expect 2 --reason 'better F1'")
def alias(
    name: NameArgument,
    alias: Annotated[
        str | None, typer.Argument(help="The alias; without it, all are listed.")
    ] = None,
    version: Annotated[str | None, typer.Argument(help="3, @3, @canary or @sha256:ab12….")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    expect: Annotated[
        str | None,
        typer.Option(help="Change nothing unless the alias is at this version, or at 'none'."),
    ] = None,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version, remove it, or list all."""
    opened = _open(registry)
    if alias is None:
        found: dict[str, Any] = {**opened.aliases(name)}
        for split in opened.rollouts.all(name).values():
            found[split.alias] = {"version": split.version, "canary": split.canary.to_dict()}
        _print_aliases(found, as_json=as_json)
        return
    if (version is None) != remove:
        raise InvalidRequest("name either a version (registry alias NAME prod 3) or --remove")
    target = None
    if version is not None:
        target = opened.resolve(parse_selector(check_name(name), version)).version
    move = opened.set_alias(name, alias, target, expect=_expected(expect), reason=reason)
    _print_move(move, as_json=as_json)


@app.command(epilog="Example: registry promote sentiment@canary prod")
def promote(
    ref: RefArgument,
    alias: Annotated[str, typer.Argument(help="The alias to move to that version.")],
    expect: Annotated[
        str | None,
        typer.Option(help="Change nothing unless the alias is at this version, or at 'none'."),
    ] = None,
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at the version that a ref means now."""
    opened = _open(registry)
    resolved = opened.resolve(ref)
    move = opened.set_alias(
        resolved.name,
        alias,
        resolved.version,
        expect=_expected(expect),
        reason=reason or f"promoted {ref}",
    )
    _print_move(move, as_json=as_json)


app.command(epilog="Example: registry canary sentiment prod 8 --percent 10 --gate errors=0.02")(
    cli_canary.canary
)


@app.command(epilog="Example: registry rollback sentiment prod --reason 'errors up'")
def rollback(
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="The alias to move back.")],
    reason: ReasonOption = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Return an alias to where it pointed before; again, and it goes further back."""
    move = _open(registry).rollback(name, alias, reason=reason)
    _print_move(move, as_json=as_json)


@app.command(epilog="Example: registry verify")
def verify(
    ref: Annotated[str | None, typer.Argument(help="One version; without it, all.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Read every byte and compare it with what was promised; exit code 5 if anything differs."""
    opened = _open(registry)
    with progress_bar("verifying", None) as progress:
        report = opened.verify(ref, progress)
    if as_json:
        print_json({"is_ok": report.is_ok, "report": report})
    else:
        console().print(cli_tables.report(report))
    if not report.is_ok:
        bad = sum(bool(check.problem) for check in report.checks) + len(report.problems)
        raise CorruptArtifact(f"{bad} problems in {opened.url}; push those adapters again")


@app.command(epilog="Example: registry serve /srv/hub --port 8080 --tokens tokens.txt")
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where repositories are kept.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8080,
    tokens: Annotated[
        Path | None,
        typer.Option(help="File of tokens, one a line: NAME read|write TOKEN. Without it all may."),
    ] = None,
) -> None:
    """Serve a Hub of one's own: what speaks to the Hugging Face Hub works by HF_ENDPOINT alone."""
    # Imported here: no other command needs a web server.
    from lorary.registry.localhub.auth import Tokens
    from lorary.registry.localhub.serve import make_server

    def ready(address: str) -> None:
        typer.echo(f"HF_ENDPOINT={address}")

    allowed = Tokens.read(tokens) if tokens is not None else Tokens()
    server, listener = make_server(folder, host=host, port=port, tokens=allowed, ready=ready)
    server.run(sockets=[listener])


def main() -> None:
    """Run the ``registry`` console script."""
    run(app, prog_name="registry")


def _open(address: str, *, create: bool = False) -> Registry:
    # Imported here: what reads tensors takes longer to import than help takes to print.
    from lorary.registry.store import Registry

    return Registry.open(address, create=create)


def _card(manifest: Manifest | None, base: str | None) -> BaseCard:
    name = base or (manifest.base.name if manifest else None)
    if name is None:
        raise InvalidRequest(
            f"the folder has no {MANIFEST_FILE} that names its base; name it with --base",
            field="base",
        )
    from lorary.registry.base import BaseCard

    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return BaseCard.from_folder(folder)
    try:
        # Not a dependency of the registry: the command uses it when it is installed.
        card = importlib.import_module("lorary.bases").find_base(name).card
    except LoraryError:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"base '{name}' is no folder, and finding it by name needs {error.name or error}: "
            "pip install 'lorary[model]', or give a folder with --base"
        ) from error
    if not isinstance(card, BaseCard):
        raise TypeError(f"lorary.bases gave {type(card).__name__} for base '{name}'")
    return card


def _expected(text: str | None) -> int | Unset | None:
    if text is None:
        return UNSET
    if text == "none":
        return None
    version = parse_selector("any", text).version
    if version is None:
        raise InvalidRequest(f"--expect is '{text}'; it must be a version's number, or 'none'")
    return version


def _print_aliases(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        console().print(cli_tables.aliases(found))


def _print_move(move: AliasMove, *, as_json: bool) -> None:
    if as_json:
        print_json(move)
    else:
        console().print(cli_tables.moves([move]))
