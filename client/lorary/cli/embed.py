"""``lorary embed``: texts to vectors."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from lorary.cli.call import JsonOption, TargetOption, adapter_arguments, print_receipt
from lorary.client import Client
from lorary.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from lorary.errors import InvalidRequest
from lorary.registry.cli_support import print_json

app = typer.Typer(name="embed", add_completion=False, pretty_exceptions_enable=False)

TEXTS_A_CALL = 64
"""Of longer lists so many are sent at a time, so that vectors come while later texts are still read."""


@app.command(epilog="Example: lorary embed search@prod 'a red cat' 'a blue dog' --normalize")
def embed(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="As in lorary call; '' is the base."),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="What to embed; without any, each line of standard input."
        ),
    ] = None,
    has_template: Annotated[
        bool, typer.Option("--template", help="Put each TEXT into the adapter's own template.")
    ] = False,
    pooling: Annotated[
        str, typer.Option(help="mean: over all tokens of a text; last: of its last token.")
    ] = "mean",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Make vectors of length 1.")
    ] = False,
    dimensions: Annotated[
        int | None, typer.Option(min=1, help="Keep so many components; default: all.")
    ] = None,
    target: TargetOption = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Print one vector a line, as JSON lists, in the order of the texts; the receipt goes to stderr."""
    wanted = texts or [line.rstrip("\n") for line in sys.stdin]
    if not all(wanted):
        raise InvalidRequest(
            f"text {wanted.index('') + 1} of {len(wanted)} is empty; leave it out.", field="inputs"
        )
    asked: dict[str, Any] = {
        **adapter_arguments(adapter),
        "pooling": pooling,
        "normalize": normalize,
        "dimensions": dimensions,
    }
    kind = "texts" if has_template else "prompts"
    found = []
    with Client(target, timeout_s=timeout) as client:
        for start in range(0, len(wanted), TEXTS_A_CALL):
            asked[kind] = wanted[start : start + TEXTS_A_CALL]
            part = client.embed(**asked)
            found += part
            if not as_json:
                for one in part:
                    typer.echo(json.dumps(one.values))
    if as_json:
        print_json(found)
    elif found:
        print_receipt(found[-1].receipt, 0)
