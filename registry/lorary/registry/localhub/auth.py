"""Who calls, and what a caller may do.

Tokens are in a file that only its owner can read, one a line: a name, what it may do, and the token::

    ada  write  hf_8e1c0c…
    ci   read   hf_77d0a2…

A token for reading sees every repository but the files of gated ones; a token for writing may do all.
Without a token public repositories can be read. Without a file of tokens the hub is open to everybody who
reaches it, and so it may only listen on loopback.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lorary.errors import ConfigError
from lorary.registry.durable import storage_errors
from lorary.registry.localhub.problems import HubProblem, repo_not_found
from lorary.registry.localhub.repos import Repo

MIN_TOKEN: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,94}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody who calls.

    Attributes:
        name: of the token; empty without one.
        may_write: whether it is a token for writing.
    """

    name: str
    may_write: bool

    @property
    def is_anonymous(self) -> bool:
        """Whether no token was sent."""
        return not self.name


ANONYMOUS: Final = Caller(name="", may_write=False)
_ANYBODY: Final = Caller(name="local", may_write=True)


class Tokens:
    """The tokens a hub accepts; an open hub has none and lets everybody do everything."""

    def __init__(self, callers: dict[str, Caller] | None = None) -> None:
        self._by_hash = None if callers is None else {_hash(t): c for t, c in callers.items()}

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything."""
        return self._by_hash is None

    @classmethod
    def read(cls, file: Path) -> Tokens:
        """Read a file of tokens.

        Raises:
            ConfigError: a line is not right, or others than the owner can read the file.
            StorageError: it cannot be read.
        """
        with storage_errors(f"read tokens from {file}"):
            mode = file.stat().st_mode
            lines = file.read_text().splitlines()
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{file} can be read by others; run: chmod 600 {file}")
        callers: dict[str, Caller] = {}
        for number, line in enumerate(lines, start=1):
            parts = line.split()
            if not parts or line.lstrip().startswith("#"):
                continue
            if (
                len(parts) != 3
                or not _NAME.fullmatch(parts[0])
                or parts[1] not in ("read", "write")
                or len(parts[2]) < MIN_TOKEN
                or parts[2] in callers
            ):
                raise ConfigError(
                    f"line {number} of {file} must be a name, 'read' or 'write', and a token of its own "
                    f"with at least {MIN_TOKEN} characters"
                )
            callers[parts[2]] = Caller(name=parts[0], may_write=parts[1] == "write")
        if not callers:
            raise ConfigError(f"{file} has no tokens; write one a line: NAME read|write TOKEN")
        return cls(callers)

    def caller(self, authorization: str) -> Caller:
        """Return who sent this header.

        Raises:
            HubProblem: 401: there is a token, and it is not known.
        """
        if self._by_hash is None:
            return _ANYBODY
        kind, _, token = authorization.partition(" ")
        if not authorization:
            return ANONYMOUS
        found = self._by_hash.get(_hash(token.strip()))
        if kind.lower() != "bearer" or found is None:
            raise HubProblem(401, "Invalid credentials in Authorization header")
        return found


class Signer:
    """Signs the addresses that are called without a token: uploads of large files."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, *parts: object) -> str:
        """Return a signature over ``parts``."""
        text = "\n".join(str(part) for part in parts).encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def check(self, signature: str, *parts: object) -> None:
        """Compare a signature.

        Raises:
            HubProblem: 403: it is another.
        """
        if not hmac.compare_digest(signature.encode(), self.sign(*parts).encode()):
            raise HubProblem(403, "This address is not signed, or its signature has expired")


def may_see(caller: Caller, repo: Repo) -> bool:
    """Tell whether ``caller`` may know that ``repo`` exists."""
    return not caller.is_anonymous or not repo.settings().private


def check_read(caller: Caller, repo: Repo | None, repo_id: str) -> Repo:
    """Return the repository if ``caller`` may see it.

    Raises:
        HubProblem: 401 or 404, which do not tell whether it exists.
    """
    if repo is None or not may_see(caller, repo):
        raise repo_not_found(repo_id, is_anonymous=caller.is_anonymous)
    return repo


def check_files(caller: Caller, repo: Repo) -> None:
    """Refuse the files of a gated repository to those who may only read.

    Raises:
        HubProblem: 401 or 403.
    """
    if repo.settings().gated and not caller.may_write:
        raise HubProblem(
            401 if caller.is_anonymous else 403,
            f"Access to model {repo.id} is restricted and you are not in the authorized list",
            code="GatedRepo",
        )


def check_write(caller: Caller) -> None:
    """Refuse changes to those who may only read.

    Raises:
        HubProblem: 401 or 403.
    """
    if caller.is_anonymous:
        raise HubProblem(401, "Invalid username or password.")
    if not caller.may_write:
        raise HubProblem(403, "This token may only read; changes need a token for writing")


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
