"""``lorary reproduce REF|FOLDER``: train it again from its manifest, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.errors import InvalidRequest
from lorary.registry.address import DEFAULT_REGISTRY
from lorary.registry.cli_options import RegistryOption, open_registry
from lorary.registry.cli_support import console, print_json, table, warn
from lorary.registry.folder import MANIFEST_FILE, read_bytes
from lorary.registry.manifest import Manifest
from lorary.trainer.threads import use_threads

if TYPE_CHECKING:
    from lorary.trainer.reproduce.run import Reproduction

app = typer.Typer(
    name="reproduce",
    help="Train a version again from its manifest, and compare.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXIT_DIFFERENT = 1
_EPILOG = (
    "Examples: lorary reproduce sentiment@prod · lorary reproduce runs/sentiment --json · "
    "lorary reproduce sentiment@3 --set data.path=reviews.jsonl. Exit code 0: within the tolerance; "
    "1: not; 9: base or data are not those it was trained with."
)


@app.command(epilog=_EPILOG)
def reproduce(
    what: Annotated[
        str,
        typer.Argument(metavar="REF|FOLDER", help="A version, or a folder that training wrote."),
    ],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Largest difference: of a loss or figure x, in units of max(|x|, 1); of all "
            "tensors together, in norms of what they were.",
        ),
    ] = 0.02,
    output: Annotated[
        Path | None, typer.Option(help="Keep the new run in this folder; by default it is dropped.")
    ] = None,
    moved: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Where base, data.path, method.quantization_plan or training.device are now.",
        ),
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default as many as it was made with.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as JSON instead of a table.")
    ] = False,
) -> None:
    """Check base and data, run the manifest's recipe again, and compare losses, figures and tensors."""
    folder = Path(what)
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.from_json(read_bytes(folder / MANIFEST_FILE))
    else:
        opened = open_registry(registry)
        resolved = opened.resolve(what)
        manifest, folder = opened.manifest(resolved), opened.fetch(resolved)
        what = f"{resolved.name}@{resolved.version}"
    wanted = threads or manifest.training.get("threads")
    count = use_threads(wanted if isinstance(wanted, int) else None)
    if isinstance(wanted, int) and count != wanted:
        warn(f"{count} threads instead of {wanted}: sums are added up in another order")
    from lorary.trainer.output import check_output
    from lorary.trainer.progress import Reporter
    from lorary.trainer.reproduce.run import reproduce as run_again

    if output is not None:
        check_output(output, force=False)
    result = run_again(
        what,
        folder,
        manifest,
        output=output,
        moved=dict(map(_pair, moved or [])),
        tolerance=tolerance,
        reporter=Reporter(),
    )
    _print(result, as_json=as_json)
    if not result.is_reproduced:
        raise typer.Exit(EXIT_DIFFERENT)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not value:
        raise InvalidRequest(f"--set '{text}' is not of the form key=value", field="set")
    return key.strip(), value.strip()


def _print(result: Reproduction, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "what": result.what,
                "reproduced": result.is_reproduced,
                "bit_equal": result.is_bit_equal,
                "tolerance": result.tolerance,
                "comparisons": result.comparisons,
                "environment": result.environment,
                "seconds": result.seconds,
            }
        )
        return
    verdict = "every bit the same" if result.is_bit_equal else "within the tolerance"
    if not result.is_reproduced:
        verdict = "NOT reproduced"
    rows = table(
        "what",
        "difference",
        "",
        "then, now",
        title=f"{result.what}: {verdict} ({result.tolerance:g})",
    )
    for one in result.comparisons:
        said = "equal" if one.is_equal else "ok" if one.is_within else "too far"
        difference = "-" if one.difference is None else f"{one.difference:.3g}"
        rows.add_row(one.what, difference, said, one.detail)
    console().print(rows)
    for line in result.environment:
        console().print(f"not as then: {line}", highlight=False)
