"""The command that serves a Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
