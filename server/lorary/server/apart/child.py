"""The engine's process: ``python -m lorary.server.apart.child SOCKET LIFE``, two open files of the door that starts it.

It builds what a server has behind its doors, says that it is ready, and does what it is told until the door says stop
or is gone. Signals are the door's: this process ignores those that people and supervisors send.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from lorary.server.apart.channel import Channel
    from lorary.server.config import ServerConfig


def read_config(settings: dict[str, Any]) -> ServerConfig:
    """Return the door's configuration, for a server without another process behind it."""
    from lorary.server.config import ServerConfig

    hints = get_type_hints(ServerConfig)
    paths = {name for name, hint in hints.items() if hint in (Path, Path | None)}
    given: dict[str, Any] = {
        key: Path(value) if key in paths and value is not None else value
        for key, value in settings.items()
    }
    return ServerConfig(**{**given, "engine_process": False})


def die_with(life: int) -> None:
    """Let the kernel end this process when the other end of a pipe is closed, whatever Python does then.

    Not ``PR_SET_PDEATHSIG``, which comes when the *thread* that started this process ends.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)


def serve(channel: Channel) -> None:
    """Build, then obey."""
    from lorary.errors import LoraryError
    from lorary.server import interpreter, logs
    from lorary.server.apart.listener import Listener, Teller
    from lorary.server.apart.nouns import Ready
    from lorary.server.build import build_backend
    from lorary.server.startup import Startup

    messages = channel.receive()
    first = next(messages, None)
    if first is None:
        return
    config = read_config(first[1])
    logs.configure(config.log_format, config.log_level)
    interpreter.share_fairly()
    teller = Teller(channel)
    try:
        with Startup(bars=config.log_format == "human" and sys.stderr.isatty()) as startup:
            backend = build_backend(
                config, deliver=teller.deliver, observer=teller, startup=startup
            )
    except LoraryError as error:
        channel.send("failed", error)
        return
    listener = Listener(backend, channel)
    interpreter.forget_what_stays()
    try:
        channel.send(
            "ready",
            Ready(
                facts=backend.facts,
                limits=backend.limits,
                can_merge=backend.merging is not None,
            ),
        )
        listener.listen(messages)
    finally:
        listener.close()


def main() -> None:
    """Run with the two files that the door has left open; they come first, what takes seconds to import later."""
    end, life = map(int, sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with(life)
    from lorary.server.apart.channel import Channel

    channel = Channel(socket.socket(fileno=end))
    try:
        serve(channel)
    finally:
        channel.close()


if __name__ == "__main__":
    main()
