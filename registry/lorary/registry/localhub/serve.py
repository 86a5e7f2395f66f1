"""Run a hub: check where it listens, open the folder, serve until told to stop."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from lorary.errors import ConfigError, MissingDependency
from lorary.loopback import is_loopback
from lorary.registry.localhub.auth import Tokens
from lorary.registry.localhub.repos import Repos

if TYPE_CHECKING:
    from collections.abc import Callable

    import uvicorn

logger = logging.getLogger(__name__)


def make_server(
    root: Path, *, host: str, port: int, tokens: Tokens, ready: Callable[[str], None]
) -> tuple[uvicorn.Server, socket.socket]:
    """Return a server and the socket it is to be run on: ``server.run(sockets=[socket])``.

    Args:
        root: the hub's folder.
        host: address to listen on.
        port: 0 takes any that is free.
        tokens: who may do what.
        ready: told the hub's address once it listens.

    Raises:
        ConfigError: the address is in use, or is not loopback and there are no tokens.
        MissingDependency: the extra is not installed.
        StorageError: the folder cannot be used.
    """
    try:
        import uvicorn

        from lorary.registry.localhub.app import Hub
    except ImportError as error:
        raise MissingDependency(
            f"registry serve needs {error.name}: pip install 'lorary[hub]'"
        ) from error
    if tokens.is_open and not is_loopback(host):
        raise ConfigError(
            f"--host is {host}, which others can reach, and there are no tokens: everybody could "
            "change everything. Name a file with --tokens, or listen on 127.0.0.1."
        )
    repos = Repos(root)
    repos.sweep()
    app = Hub(repos, tokens).app()
    listener = _listen(host, port)
    bound_host, bound_port = listener.getsockname()[:2]
    shown = f"[{bound_host}]" if ":" in bound_host else bound_host
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    ready(f"http://{shown}:{bound_port}")
    return uvicorn.Server(config), listener


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port, or "
            "stop what listens there."
        ) from error
