"""TLS for the server's ports, with certificates that are read again when they change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import grpc

from lorary.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("lorary.server")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files: a chain and its key, and the authorities of client certificates, if these are asked for."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))


def check_files(files: TlsFiles) -> None:
    """Check that the files can be read and that the key is the certificate's.

    Raises:
        ConfigError: no; with the file.
    """
    for path in files.paths:
        if not path.is_file():
            raise ConfigError(f"the TLS file '{path}' does not exist or is no file.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"'{files.certificate}' and '{files.key}' are no certificate with its key: {error}. Both "
            "are PEM files, the key without a password."
        ) from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"'{files.client_ca}' holds no certificates of authorities: {error}."
            ) from error


class _Followed:
    """Files that are looked at now and then: have they changed, and can they be used?"""

    def __init__(self, files: TlsFiles) -> None:
        check_files(files)
        self._files = files
        self._seen = _stamp(files)

    def fresh(self, make: Callable[[TlsFiles], T]) -> T | None:
        """Return what ``make`` makes of the files once they have changed; bad ones are logged."""
        stamp = _stamp(self._files)
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            check_files(self._files)
            made = make(self._files)
        except (ConfigError, OSError) as error:
            log.error("the TLS certificate stays as it was: %s", error)  # noqa: TRY400
            return None
        log.info("the TLS certificate was read again")
        return made


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context for Python's own TLS that follows the files, as ``server_credentials`` do.

    Raises:
        ConfigError: the files cannot be used now.
    """
    followed = _Followed(files)
    newest = _context(files)
    first = _context(files)

    def follow(connection: ssl.SSLObject, _name: str | None, _was: ssl.SSLContext) -> None:
        # Asked at every handshake, also where the client names no server.
        nonlocal newest
        newest = followed.fresh(_context) or newest
        connection.context = newest

    first.sni_callback = follow
    return first


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return credentials that follow the files: new connections get what is in them then.

    With ``client_ca`` every client must show a certificate of one of these authorities.

    Raises:
        ConfigError: the files cannot be used now.
    """
    followed = _Followed(files)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # Asked at every handshake; None keeps what there is.
        return followed.fresh(_configuration)

    # The stubs do not know that None is an answer; gRPC's own documentation does.
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(files), fetcher, require_client_authentication=files.client_ca is not None
    )


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    if files.client_ca is not None:
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    pair = (files.key.read_bytes(), files.certificate.read_bytes())
    roots = None if files.client_ca is None else files.client_ca.read_bytes()
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)


def _stamp(files: TlsFiles) -> tuple[tuple[int, int] | None, ...]:
    stamps: list[tuple[int, int] | None] = []
    for path in files.paths:
        try:
            status = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_mtime_ns, status.st_ino))
    return tuple(stamps)
