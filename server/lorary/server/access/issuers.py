"""Who else may say who calls: issuers of JSON Web Tokens, as the file of tenants names them.

::

    issuers:
      https://login.example.com:                     # the tokens' `iss`
        keys: https://login.example.com/jwks.json    # or a file
        audience: lorary                             # must be in the tokens' `aud`
        claim: sub                                   # what tells tenants apart; default: sub
        algorithms: [ES256]                          # default: RS256, PS256, ES256, EdDSA
    tenants:
      acme:
        subjects:
          https://login.example.com: [acme-batch, acme-web]
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lorary.errors import ConfigError
from lorary.loopback import is_loopback

if TYPE_CHECKING:
    from collections.abc import Mapping

ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA")
"""Signatures by default; all are of key pairs: with a shared secret whoever checks could also issue."""
_MORE = ("RS384", "RS512", "PS384", "PS512", "ES384", "ES512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """An issuer of tokens.

    Attributes:
        name: the tokens' ``iss``, compared letter by letter.
        keys: a file, or an ``https`` address, of its public keys as a JWKS (RFC 7517).
        audience: what the tokens' ``aud`` must have.
        claim: the claim that tells tenants apart.
        algorithms: signatures that are taken.
    """

    name: str
    keys: Path | str
    audience: str
    claim: str = "sub"
    algorithms: tuple[str, ...] = ALGORITHMS


def read_issuers(path: Path, raw: Any) -> dict[str, Issuer]:
    """Check what a file of tenants says of issuers; a file of keys is meant from the file's folder.

    Raises:
        ConfigError: it makes no sense; with the place.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"'{path}', issuers: it must be a mapping, and is {raw!r}.")
    if raw and find_spec("jwt") is None:
        raise ConfigError(
            f"'{path}', issuers: checking their tokens needs 'PyJWT', which is not installed. Run: pip "
            "install 'lorary[jwt]'"
        )
    return {name: _issuer(path, name, said) for name, said in raw.items()}


def read_subjects(
    where: str, value: Any, issuers: Mapping[str, Issuer]
) -> tuple[tuple[str, str], ...]:
    """Check a tenant's subjects; return pairs of issuer and claim.

    Raises:
        ConfigError: it makes no sense, or an issuer is not in the file.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: it is a mapping from issuers to lists, not {value!r}.")
    found = []
    for issuer, subjects in value.items():
        if issuer not in issuers:
            raise ConfigError(
                f"{where}: '{issuer}' is no issuer of this file; add it to 'issuers'."
            )
        if not isinstance(subjects, list) or not all(isinstance(s, str) and s for s in subjects):
            raise ConfigError(f"{where}, '{issuer}': it is a list of texts, not {subjects!r}.")
        found += [(issuer, subject) for subject in subjects]
    return tuple(found)


def _issuer(path: Path, name: Any, said: Any) -> Issuer:
    where = f"'{path}', issuer '{name}'"
    if not isinstance(name, str) or not name or not isinstance(said, dict):
        raise ConfigError(f"{where}: it is the tokens' 'iss', with a mapping of keys and audience.")
    known = ("keys", "audience", "claim", "algorithms")
    for key in said:
        if key not in known:
            raise ConfigError(f"{where}: '{key}' is unknown; there are {', '.join(known)}.")
    for key in ("keys", "audience"):
        if key not in said:
            raise ConfigError(f"{where}: '{key}' is missing.")
    for key in ("keys", "audience", "claim"):
        if not isinstance(said.get(key, "x"), str) or not said.get(key, "x"):
            raise ConfigError(f"{where}, {key}: it is a text, not {said[key]!r}.")
    algorithms = said.get("algorithms", list(ALGORITHMS))
    allowed = ALGORITHMS + _MORE
    if not isinstance(algorithms, list) or not algorithms or not set(algorithms) <= set(allowed):
        raise ConfigError(
            f"{where}, algorithms: it is a list of {', '.join(allowed)}, not {algorithms!r}. Secrets that "
            "are shared (HS256) and 'none' are not taken."
        )
    return Issuer(
        name=name,
        keys=_place(path, where, said["keys"]),
        audience=said["audience"],
        claim=said.get("claim", "sub"),
        algorithms=tuple(algorithms),
    )


def _place(path: Path, where: str, text: str) -> Path | str:
    """Return where keys are: a file's path, or an address."""
    address = urlsplit(text)
    if not address.scheme:
        return path.parent / text
    host = address.hostname or ""
    if address.scheme == "https" or (address.scheme == "http" and is_loopback(host)):
        return text
    raise ConfigError(
        f"{where}, keys: '{text}' is neither a file nor an https address. Whoever can change keys on their "
        "way can be anybody, so http is for this machine only."
    )
