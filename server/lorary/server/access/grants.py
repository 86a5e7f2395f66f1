"""The file of tenants: who they are, how they prove it, what they may do.

::

    tenants:
      acme:
        tokens: [5f2c…]              # sha256 of each, as `lorary token` prints it
        certificates: [spiffe://prod/acme]
        adapters: ["acme-*", shared] # names, * and ? as in a shell; default: all
        base: false                  # the bare base; default: true
        max_calls: 64                # at once
        calls_per_minute: 600
      operations:
        role: admin
        tokens: [91ab…]

``issuers`` beside ``tenants``, and a tenant's ``subjects``, are in ``issuers``.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import time
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from lorary.errors import ConfigError
from lorary.server.access.issuers import Issuer, read_issuers, read_subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

log = logging.getLogger("lorary.server")

Role = Literal["user", "admin"]
Proof = TypeVar("Proof", str, tuple[str, str])

LOOK_AGAIN_S = 1.0
"""How long a change of the file may go unnoticed."""
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who calls.

    Attributes:
        name: in logs and metrics.
        role: ``user`` may call Inference; ``admin`` Control and reflection as well.
        adapters: globs of the names that it may see.
        base: whether it may call the bare base.
        max_calls: most calls at once; 0 sets no cap.
        calls_per_minute: 0 sets no cap. A burst of a sixth of it is let through at once.
        tokens: sha256 of each of its tokens, in hex.
        certificates: alternative names (URI or DNS) of client certificates that are its own.
        subjects: issuers of JSON Web Tokens, each with what they call it.
    """

    name: str
    role: Role = "user"
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    max_calls: int = 0
    calls_per_minute: float = 0.0
    tokens: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    subjects: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grants:
    """All tenants, by what each can prove."""

    by_token: Mapping[str, Tenant]
    by_certificate: Mapping[str, Tenant]
    by_subject: Mapping[tuple[str, str], Tenant] = field(default_factory=dict)
    issuers: Mapping[str, Issuer] = field(default_factory=dict)

    @property
    def has_certificates(self) -> bool:
        """Whether some tenant is known by a certificate."""
        return bool(self.by_certificate)


class GrantsFile:
    """The file, read again when it has changed.

    A change that cannot be read leaves everything as it was, and is logged: a slip of the pen must
    neither lock everybody out nor let everybody in.

    Args:
        path: the file.
        clock: seconds.

    Raises:
        ConfigError: it cannot be read now.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = _stamp(path)
        self._grants = read_grants(path)
        self._looked_s = clock()

    @property
    def grants(self) -> Grants:
        """What the file says."""
        now = self._clock()
        if now - self._looked_s >= LOOK_AGAIN_S:
            self._looked_s = now
            self._look()
        return self._grants

    def _look(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._grants = read_grants(self._path)
        except ConfigError as error:
            log.error("access stays as it was: %s", error)  # noqa: TRY400 - the message says it all
            return
        log.info("access: '%s' was read again", self._path)


def read_grants(path: Path) -> Grants:
    """Read and check a file of tenants.

    Raises:
        ConfigError: it is missing, is no YAML, or says what makes no sense; with the place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of tenants '{path}' cannot be read: {error}.") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the file of tenants '{path}' is no YAML: {error}") from error
    is_right = isinstance(raw, dict) and {"tenants"} <= set(raw) <= {"tenants", "issuers"}
    if not is_right or not isinstance(raw["tenants"], dict):
        raise ConfigError(
            f"the file of tenants '{path}' must have a key 'tenants', with a name and a mapping for each, "
            "and perhaps 'issuers'; docs/security.md has an example."
        )
    issuers = read_issuers(path, raw.get("issuers", {}))
    by_token: dict[str, Tenant] = {}
    by_certificate: dict[str, Tenant] = {}
    by_subject: dict[tuple[str, str], Tenant] = {}
    for name, said in raw["tenants"].items():
        tenant = _tenant(path, name, said, issuers)
        _add(path, by_token, tenant, tenant.tokens, "token")
        _add(path, by_certificate, tenant, tenant.certificates, "certificate")
        _add(path, by_subject, tenant, tenant.subjects, "subject")
    return Grants(
        by_token=by_token, by_certificate=by_certificate, by_subject=by_subject, issuers=issuers
    )


def _add(
    path: Path, known: dict[Proof, Tenant], tenant: Tenant, proofs: tuple[Proof, ...], what: str
) -> None:
    for proof in proofs:
        if proof in known:
            shown = proof[:24] if isinstance(proof, str) else " ".join(map(str, proof))
            raise ConfigError(
                f"'{path}': {what} '{shown}' is of both '{known[proof].name}' and "
                f"'{tenant.name}'; it must say who calls. Give each a {what} of its own."
            )
        known[proof] = tenant


def _tenant(path: Path, name: Any, said: Any, issuers: Mapping[str, Issuer]) -> Tenant:
    where = f"'{path}', tenant '{name}'"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: a name has 1 to 64 lower-case letters, digits, '.', '_' and '-', and begins and "
            "ends with a letter or digit."
        )
    if not isinstance(said, dict):
        raise ConfigError(f"{where}: it must be a mapping, and is {said!r}.")
    known = [field.name for field in fields(Tenant) if field.name != "name"]
    for key in said:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}."
            raise ConfigError(f"{where}: '{key}' is unknown; {hint}")
    checks = _CHECKS | {"subjects": partial(read_subjects, issuers=issuers)}
    checked = {key: checks[key](f"{where}, {key}", value) for key, value in said.items()}
    if not any(checked.get(key) for key in ("tokens", "certificates", "subjects")):
        raise ConfigError(
            f"{where}: it has neither tokens nor certificates nor subjects, so nobody could be it. Run "
            "'lorary token' for one."
        )
    return Tenant(name=name, **checked)


def _role(where: str, value: Any) -> str:
    if value not in ("user", "admin"):
        raise ConfigError(f"{where}: it is 'user' or 'admin', not {value!r}.")
    return str(value)


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: it is true or false, not {value!r}.")
    return value


def _texts(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(
            f"{where}: it is a list of texts, not {value!r}. Quote what begins with *."
        )
    return tuple(value)


def _hashes(where: str, value: Any) -> tuple[str, ...]:
    for text in (found := _texts(where, value)):
        if not _HASH.fullmatch(text):
            # Never the value: it may be the token itself.
            raise ConfigError(
                f"{where}: an entry is no sha256 (64 lower-case hex digits). The file holds hashes, never "
                "the tokens; 'lorary token --hash' makes one of a token on standard input."
            )
    return found


def _count(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{where}: it is a whole number from 0 on (0: no cap), not {value!r}.")
    return value


def _rate(where: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{where}: it is a number from 0 on (0: no cap), not {value!r}.")
    return float(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "role": _role,
    "adapters": _texts,
    "base": _flag,
    "max_calls": _count,
    "calls_per_minute": _rate,
    "tokens": _hashes,
    "certificates": _texts,
}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file's content; None while it is away."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)
