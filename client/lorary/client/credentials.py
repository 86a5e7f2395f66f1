"""How a client proves who it is, and finds out who answers: TLS and tokens."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from lorary.client.metadata import WithMetadata
from lorary.errors import ConfigError
from lorary.loopback import is_loopback

if TYPE_CHECKING:
    from typing import Any, Self

_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")
_LOCAL = re.compile(r"(?:ipv4:|ipv6:|dns:(?:///)?)?(?P<host>\[[^\]]*\]|[^:/\[\]]+)(?::\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a client shows, and whom it trusts.

    Attributes:
        token: sent with every call, as ``authorization: Bearer …``; None sends none.
        tls: speak TLS; any of the next three means it, too.
        ca: PEM file of the authorities that servers' certificates must come from; None: the system's.
        certificate: PEM file of the client's own chain, for servers that ask for one.
        key: its PEM file; needed with ``certificate``.
        insecure: send the token also where the network can read it.
    """

    token: str | None = None
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False

    @classmethod
    def from_environment(cls) -> Self:
        """Return what the environment says; nothing where it says nothing.

        ``LORARY_TOKEN``, ``LORARY_CA``, ``LORARY_CERT`` and ``LORARY_KEY`` (files), ``LORARY_TLS`` and
        ``LORARY_INSECURE_TOKEN`` (1 or 0).

        Raises:
            ConfigError: a switch is neither on nor off.
        """
        return cls(
            token=os.environ.get("LORARY_TOKEN", "").strip() or None,
            tls=_switch("LORARY_TLS"),
            ca=_path("LORARY_CA"),
            certificate=_path("LORARY_CERT"),
            key=_path("LORARY_KEY"),
            insecure=_switch("LORARY_INSECURE_TOKEN"),
        )

    @property
    def has_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls or self.ca is not None or self.certificate is not None

    def bound(self, stub: Any) -> Any:
        """Return a stub whose calls carry the token."""
        if self.token is None:
            return stub
        metadata = (("authorization", f"Bearer {self.token}"),)
        return WithMetadata(stub, lambda _request: metadata)

    def check(self, target: str) -> None:
        """Check that they go together, and that the token would not travel in the clear.

        Raises:
            ConfigError: they do not, or it would.
        """
        if (self.certificate is None) != (self.key is None):
            raise ConfigError(
                "a client certificate needs its key, and a key its certificate; give both or neither."
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError(
                "the token holds characters that no header may have, perhaps a line break; check where "
                "it comes from."
            )
        if self.token and not self.has_tls and not self.insecure and not is_local(target):
            raise ConfigError(
                f"the token would go to '{target}' unencrypted, for everybody on the way to read. Speak "
                "TLS (LORARY_TLS=1 or LORARY_CA=file; tls=True, ca=…), or set LORARY_INSECURE_TOKEN=1 "
                "(insecure=True) where the network is trusted."
            )

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Return gRPC's form of it; None without TLS.

        Raises:
            ConfigError: a file cannot be read.
        """
        if not self.has_tls:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca),
            private_key=_read(self.key),
            certificate_chain=_read(self.certificate),
        )


def is_local(target: str) -> bool:
    """Whether what is sent to a gRPC target stays on this machine."""
    if target.startswith("unix:"):
        return True
    match = _LOCAL.fullmatch(target)
    return match is not None and is_loopback(match["host"].strip("[]"))


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "").strip().lower()
    if value not in _ON + _OFF:
        raise ConfigError(f"{variable} is '{value}'; it is 1 or 0.")
    return value in _ON


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the TLS file '{path}' cannot be read: {error.strerror}.") from error
