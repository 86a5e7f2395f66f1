"""The ``registry`` command: its table of contents. Every ``cli_*`` module holds one heading's commands."""

from __future__ import annotations

from typing import Final

import typer

from lorary.registry.cli_lazy import Entry, lazy_group
from lorary.registry.cli_support import run

VERSIONS: Final = "Versions"
ALIASES: Final = "Aliases"
UPKEEP: Final = "Upkeep"
HUBS: Final = "Hubs"

COMMANDS: Final[dict[str, Entry]] = {
    "push": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:push",
        "Validate an adapter and keep it as a version; equal content is the version it was.",
        "push runs/sentiment sentiment --alias prod",
    ),
    "pull": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:pull",
        "Copy a version to a standard PEFT folder, every byte verified.",
        "pull sentiment@prod ./sentiment",
    ),
    "list": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:list_versions",
        "List versions with their aliases and metrics.",
        "list --json",
    ),
    "show": Entry(
        VERSIONS,
        "lorary.registry.cli_versions:show",
        "Show everything a version says about itself.",
        "show sentiment@prod",
    ),
    "search": Entry(
        VERSIONS,
        "lorary.registry.cli_review:search",
        "Find versions by what their manifests say: fields, figures, words.",
        "search base=smollm2* task=classification 'accuracy>0.9' --latest",
    ),
    "diff": Entry(
        VERSIONS,
        "lorary.registry.cli_review:diff",
        "Say what changed between two versions: configuration, data, metrics, every module's weights.",
        "diff sentiment@6 @7",
    ),
    "check": Entry(
        VERSIONS,
        "lorary.registry.cli_check:check",
        "Say everything that is wrong with an adapter, and who can load it with which deviation.",
        "check runs/sentiment --base smollm2-135m --server vllm",
    ),
    "export": Entry(
        VERSIONS,
        "lorary.registry.cli_export:export",
        "Write a version in the form that another program loads.",
        "export sentiment@prod ./gguf --to gguf",
    ),
    "import": Entry(
        VERSIONS,
        "lorary.registry.cli_hubs:import_adapter",
        "Take an adapter from a PEFT repository on a Hub, through all checks of a push.",
        "import acme/sentiment@v3 sentiment --base smollm2-135m",
    ),
    "alias": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:alias",
        "Point an alias at a version, remove it, or list all.",
        "alias sentiment prod @3 --expect 2 --reason 'better F1'",
    ),
    "promote": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:promote",
        "Point an alias at a version whose figures meet what is required.",
        "promote sentiment 7 --to prod --require 'accuracy>=0.90' --require 'accuracy>=prod-0.01'",
    ),
    "canary": Entry(
        ALIASES,
        "lorary.registry.cli_canary:canary",
        "Let a second version answer a share of an alias's calls; end that, or promote it.",
        "canary sentiment prod 8 --percent 10 --gate errors=0.02",
    ),
    "rollback": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:rollback",
        "Return an alias to where it pointed before; again, and it goes further back.",
        "rollback sentiment prod --reason 'errors up'",
    ),
    "protect": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:protect",
        "Let an alias move only to what meets its requirements, or by --force with a --reason.",
        "protect sentiment prod --require 'accuracy>=prod-0.01'",
    ),
    "whowas": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:whowas",
        "Say which version an alias pointed at, at a time in the past.",
        "whowas sentiment prod --at 2026-11-01T12:00",
    ),
    "log": Entry(
        ALIASES,
        "lorary.registry.cli_aliases:log",
        "Show who moved which alias, when and why.",
        "log sentiment --alias prod",
    ),
    "deprecate": Entry(
        UPKEEP,
        "lorary.registry.cli_upkeep:deprecate",
        "Say that a version should not be used any more; it still resolves, with a warning.",
        "deprecate sentiment 6 --reason 'trained on the wrong labels'",
    ),
    "delete": Entry(
        UPKEEP,
        "lorary.registry.cli_upkeep:delete",
        "Delete a version that no alias points at; its number is never used again.",
        "delete sentiment@2 --yes",
    ),
    "gc": Entry(
        UPKEEP,
        "lorary.registry.cli_upkeep:gc",
        "Free what no version needs: files of deleted versions, left-overs of interrupted work.",
        "gc --dry-run --grace 7d",
    ),
    "audit": Entry(
        UPKEEP,
        "lorary.registry.cli_fsck:audit",
        "Show every change of an adapter: who, when, what, and why; exit code 5 if it was tampered with.",
        "audit sentiment",
    ),
    "fsck": Entry(
        UPKEEP,
        "lorary.registry.cli_fsck:fsck",
        "Look for damage and left-overs; exit code 5 if damage stays.",
        "fsck --repair --from hf://acme",
    ),
    "sign": Entry(
        UPKEEP,
        "lorary.registry.cli_sign:sign",
        "Sign a version: its files, its name, its number, its digest and its base.",
        "sign sentiment@3 --key key.pem",
    ),
    "verify-signature": Entry(
        UPKEEP,
        "lorary.registry.cli_sign:verify_signature",
        "Check that a trusted key signed a version under this name; exit code 5 if not.",
        "verify-signature sentiment@prod --trusted-keys key.pub",
    ),
    "verify": Entry(
        UPKEEP,
        "lorary.registry.cli_versions:verify",
        "Read every byte and compare it with what was promised; exit code 5 if anything differs.",
        "verify",
    ),
    "poison": Entry(
        UPKEEP,
        "lorary.registry.cli_check:poison",
        "Write hostile adapters for a base, one folder each, and try a loader on them.",
        "poison corpus --base smollm2-135m",
    ),
    "mirror": Entry(
        HUBS,
        "lorary.registry.cli_hubs:mirror",
        "Copy adapters with versions, aliases and logs to another registry; again, and only what is new.",
        "mirror file:///srv/adapters hf://acme --only sentiment",
    ),
    "login": Entry(
        HUBS,
        "lorary.registry.cli_hubs:login",
        "Check a token of the Hub and keep it, for this and every other program that uses the Hub.",
        "login",
    ),
    "serve": Entry(
        HUBS,
        "lorary.registry.cli_serve:serve",
        "Serve a Hub of one's own: what speaks to the Hugging Face Hub works by HF_ENDPOINT alone.",
        "serve /srv/hub --port 8080 --tokens tokens.txt",
    ),
}

app = typer.Typer(
    name="registry",
    cls=lazy_group(COMMANDS, prog_name="registry"),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def registry() -> None:
    """Keep adapters as immutable, numbered, verified versions, with movable aliases.

    A ref is [bold]name[/] (the newest version), [bold]name@prod[/] (an alias), [bold]name@3[/] (a
    version) or [bold]name@sha256:ab12…[/] (a digest).
    """


def main() -> None:
    """Run the ``registry`` console script."""
    run(app, prog_name="registry")
