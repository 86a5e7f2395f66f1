"""Which adapters were on the device, kept on disk, so that a server comes back with its hottest ones loaded.

``<state folder>/residency.json``, written whole beside and renamed, every ``INTERVAL_S`` and at the end::

    {"format_version": 1, "base": "sha256:…", "adapters": [
      {"name": "sentiment", "version": 3, "digest": "sha256:…", "uses": 12, "pinned": false}]}

The hottest come first, and are loaded first, one after the other, as long as there is free memory: what callers
ask for meanwhile is never evicted for it. What is in the file is a hint and trusted with nothing: every
version is resolved and verified as any other. A file of another base, or one that cannot be read, is left aside.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from lorary.errors import ConfigError, LoraryError, RegistryUnavailable, StorageError
from lorary.registry import Resolved
from lorary.server.adapters.resident import HotAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorary.server.adapters.residency import Residency

logger = logging.getLogger(__name__)

INTERVAL_S = 30.0
FILE = "residency.json"
_FORMAT_VERSION = 1


class StateFolder:
    """A folder that is this server's alone until it is closed, or the process dies.

    Args:
        path: made if it is missing.

    Raises:
        ConfigError: another server uses the folder.
        StorageError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path)

    def close(self) -> None:
        """Let another server have it."""
        os.close(self._lock)


class WarmStart:
    """Loads what was there when the last server of this state folder wrote it, and keeps writing.

    Args:
        folder: closed at the end.
        residency: whose adapters.
        fingerprint: the base's.
    """

    def __init__(self, folder: StateFolder, residency: Residency, *, fingerprint: str) -> None:
        self._folder = folder
        self._residency = residency
        self._fingerprint = fingerprint
        self._pending = read(folder.path / FILE, fingerprint)
        self._written: bytes | None = None
        self._stop = threading.Event()
        self._restored = threading.Event()
        self._thread = threading.Thread(target=self._run, name="residency-state", daemon=True)

    def start(self) -> None:
        """Begin to load, in the background."""
        self._thread.start()

    def wait(self) -> None:
        """Return once everything that can be loaded is."""
        self._restored.wait()

    def close(self) -> None:
        """Write the state a last time; call it before the residency is closed."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write()
        self._folder.close()

    def _run(self) -> None:
        try:
            self._restore()
        finally:
            self._restored.set()
        while not self._stop.wait(INTERVAL_S):
            self._write()

    def _restore(self) -> None:
        num_loaded = 0
        while self._pending and not self._stop.is_set():
            hot = self._pending[0]
            try:
                if not self._residency.warm(hot):
                    # No more room. Colder ones may be smaller, but what is free is for callers.
                    break
                num_loaded += 1
            except RegistryUnavailable as error:
                logger.warning("adapters of the last run are not loaded: %s", error)
                break
            except LoraryError as error:
                logger.warning("'%s' of the last run is not loaded: %s", hot.resolved.name, error)
            self._pending.pop(0)
        if num_loaded:
            logger.info("%d adapters of the last run are loaded", num_loaded)
        if not self._stop.is_set():
            self._pending.clear()

    def _write(self) -> None:
        """Write the state if it has changed; what could not yet be loaded is kept for next time."""
        here = self._residency.hottest_first()
        known = {hot.resolved.digest for hot in here}
        rest = [hot for hot in self._pending if hot.resolved.digest not in known]
        raw = encode([*here, *rest], self._fingerprint)
        if raw == self._written:
            return
        path = self._folder.path / FILE
        partial = path.with_name(f"{FILE}.tmp-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            # A server goes on without it; the next interval tries again.
            logger.warning("cannot write %s: %s", path, error.strerror or error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return
        self._written = raw


def encode(hot: Sequence[HotAdapter], fingerprint: str) -> bytes:
    """Return the file's content."""
    adapters = [
        {
            "name": one.resolved.name,
            "version": one.resolved.version,
            "digest": one.resolved.digest,
            "uses": one.uses,
            "pinned": one.pinned,
        }
        for one in hot
    ]
    state = {"format_version": _FORMAT_VERSION, "base": fingerprint, "adapters": adapters}
    return (json.dumps(state, indent=1) + "\n").encode()


def read(path: Path, fingerprint: str) -> list[HotAdapter]:
    """Return what a file says was there, hottest first; nothing for another base or a bad file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("cannot read %s: %s", path, error.strerror or error)
        return []
    try:
        state: dict[str, Any] = json.loads(raw)
        if state["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format_version {state['format_version']}")
        if state["base"] != fingerprint:
            logger.info("%s is of another base; its adapters are not loaded", path)
            return []
        return [
            HotAdapter(
                resolved=Resolved(
                    name=str(one["name"]),
                    version=int(one["version"]),
                    digest=str(one["digest"]),
                    alias=None,
                ),
                pinned=one["pinned"] is True,
                uses=int(one["uses"]),
            )
            for one in state["adapters"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is not what a server writes (%r); it is left aside", path, error)
        return []


def _lock(folder: Path) -> int:
    """Make a folder and hold it until the descriptor is closed, or the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"cannot use --state-dir {folder}: {error.strerror or error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"--state-dir {folder} is another server's; give each server a folder of its own."
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise StorageError(f"cannot lock {folder}: {error.strerror or error}") from error
    return descriptor
