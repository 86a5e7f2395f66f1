"""``lorary token``: make a token for a tenant of a server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorary.errors import InvalidRequest
from lorary.server.access.tokens import new_token, token_hash

app = typer.Typer(name="token", add_completion=False, pretty_exceptions_enable=False)

MIN_CHARS = 32


@app.command(epilog="Example: lorary token > acme.token")
def token(
    is_hash: Annotated[
        bool, typer.Option("--hash", help="Print the hash of the token on standard input.")
    ] = False,
) -> None:
    """Print a new token, and on stderr the hash that the server's file of tenants gets."""
    if is_hash:
        given = sys.stdin.read().strip()
        if len(given) < MIN_CHARS:
            raise InvalidRequest(
                f"the token on standard input has {len(given)} characters; {MIN_CHARS} random ones at "
                "least keep it from being guessed. 'lorary token' makes a good one."
            )
        typer.echo(token_hash(given))
        return
    made = new_token()
    typer.echo(made)
    typer.echo(f"for the file of tenants: {token_hash(made)}", err=True)
