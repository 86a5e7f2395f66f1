"""Messages between the door and the engine's process: lists of JSON, a line each, over a pair of sockets.

``send`` never blocks its caller, which may be the engine between two steps: a thread encodes what has been
sent meanwhile and writes it at once, while the model computes.
"""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from lorary.server.apart.nouns import to_row

if TYPE_CHECKING:
    from collections.abc import Iterator

_RECEIVED_BYTES = 1 << 18
_FLUSH_S = 5.0
_encode = json.JSONEncoder(default=to_row, check_circular=False, separators=(",", ":")).encode


class Channel:
    """One end of the pair.

    Args:
        end: the socket; the channel owns it from here.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._unsent: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="channel", daemon=True)
        self._writer.start()

    def send(self, *message: Any) -> None:
        """Send a message; callable from any thread. What is sent to nobody is dropped."""
        self._unsent.put(message)

    def receive(self) -> Iterator[list[Any]]:
        """Yield messages as they come, until the other end is closed or its process is gone."""
        rest = b""
        while True:
            try:
                received = self._socket.recv(_RECEIVED_BYTES)
            except OSError:
                received = b""
            if not received:
                return
            # A line that is cut is completed by the next bytes.
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                yield json.loads(line)

    def close(self) -> None:
        """Send what is unsent, then close; idempotent."""
        self._unsent.put(None)
        self._writer.join(_FLUSH_S)
        self._shut()
        self._socket.close()

    def _shut(self) -> None:
        """End the receiving at both ends."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        try:
            while (messages := self._take()) is not None:
                self._socket.sendall("".join(_encode(m) + "\n" for m in messages).encode())
        except OSError:
            return  # the other process is gone, which the receiving side tells
        except BaseException:
            # What cannot be said must not be waited for.
            self._shut()
            raise

    def _take(self) -> list[tuple[Any, ...]] | None:
        """Return all that is to be sent, waiting for a first message; None at the end."""
        first = self._unsent.get()
        if first is None:
            return None
        messages = [first]
        try:
            while (message := self._unsent.get_nowait()) is not None:
                messages.append(message)
            self._unsent.put(None)
        except Empty:
            pass
        return messages
