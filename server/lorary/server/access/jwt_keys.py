"""The public keys of issuers, in memory: calls never wait for a file or for the network.

A thread reads every place again after ``RENEW_S``, or after ``RETRY_S`` where it failed or a token named a key
that nobody knows. Keys that were read stay until others are there, also while the issuer is away.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

log = logging.getLogger("lorary.server")

RENEW_S = 300.0
"""How old keys may be."""
RETRY_S = 10.0
"""The least between two looks at one place."""
TIMEOUT_S = 5.0
MAX_BYTES = 1 << 20


@dataclass(slots=True)
class _Place:
    """What is known of one place; ``keys`` by ``kid``, None as long as nothing could be read."""

    keys: Mapping[str, Any] | None = None
    looked_s: float = -math.inf
    is_wanted: bool = False
    trouble: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class JwtKeys:
    """Keys by place and ``kid``; thread-safe.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: dict[Path | str, _Place] = {}
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def use(self, places: Iterable[Path | str]) -> None:
        """Know these places and no others; new ones are read by the thread, or by ``renew_due``."""
        self._places = {place: self._places.get(place, _Place()) for place in places}
        if self._places and self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="jwt-keys", daemon=True)
            self._thread.start()
        self._wake.set()

    def find(self, place: Path | str, kid: str) -> Any | None:
        """Return a key, a ``jwt.PyJWK``; None where it is not known, and then it is looked for."""
        found = self._places.get(place)
        if found is None:
            return None
        key = (found.keys or {}).get(kid)
        if key is None:
            found.is_wanted = True
            self._wake.set()
        return key

    def trouble(self, place: Path | str) -> str:
        """Return why a place's keys are not there or may be old; empty when they are as they should be."""
        found = self._places.get(place)
        if found is None or (found.keys is None and not found.trouble):
            return "they were not read yet"
        return found.trouble

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wake.set()

    def renew_due(self) -> None:
        """Look again where it is time; what the thread does, over and over."""
        for place, known in list(self._places.items()):
            age_s = self._clock() - known.looked_s
            is_urgent = known.is_wanted or known.keys is None or bool(known.trouble)
            if age_s >= (RETRY_S if is_urgent else RENEW_S):
                self._look(place, known)

    def _renew(self) -> None:
        while not self._closed:
            self._wake.wait(RETRY_S)
            self._wake.clear()
            self.renew_due()

    def _look(self, place: Path | str, known: _Place) -> None:
        with known.lock:
            known.looked_s, known.is_wanted = self._clock(), False
            try:
                known.keys = _parsed(_read(place))
            except (OSError, ValueError) as error:
                if not known.trouble:
                    log.error("the keys of '%s' cannot be read: %s", place, error)  # noqa: TRY400
                known.trouble = str(error)
            else:
                known.trouble = ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Keys come from where the file of tenants says, or not at all."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, *rest: Any) -> None:
        raise urllib.error.HTTPError(req.full_url, code, "it points elsewhere", rest[0], fp)


def _read(place: Path | str) -> bytes:
    """Read a place whole.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too long.
    """
    if isinstance(place, Path):
        with place.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    else:
        with urllib.request.build_opener(_NoRedirects).open(place, timeout=TIMEOUT_S) as answer:
            raw = answer.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES} bytes")
    return raw


def _parsed(raw: bytes) -> dict[str, Any]:
    """Return the public keys of a JWKS by ``kid``; keys that cannot sign tokens are left out.

    Raises:
        ValueError: it is no JWKS, or has no key that could be used.
    """
    import jwt

    said = json.loads(raw)
    listed = said.get("keys") if isinstance(said, dict) else None
    if not isinstance(listed, list):
        raise ValueError("it is no JWKS: an object with a list 'keys'")
    found = {}
    for one in listed:
        is_public = isinstance(one, dict) and one.get("kty") in ("RSA", "EC", "OKP")
        if not is_public or one.get("use", "sig") != "sig":
            continue
        try:
            found[str(one.get("kid", ""))] = jwt.PyJWK.from_dict(one)
        except jwt.PyJWTError as error:
            log.warning("a key of a JWKS is left out: %s", error)
    if not found:
        raise ValueError("none of its keys is one that tokens are signed by")
    return found
