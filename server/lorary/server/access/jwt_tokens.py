"""JSON Web Tokens (RFC 7519): whose key signed one, and who it says is calling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorary.errors import Unauthenticated, Unavailable
from lorary.server.status import clip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorary.server.access.issuers import Issuer
    from lorary.server.access.jwt_keys import JwtKeys

MAX_CHARS = 16_384
LEEWAY_S = 30
"""How far clocks may be apart."""


def looks_like_jwt(token: str) -> bool:
    """Whether a token has a JWT's three parts; ours have no dots."""
    return token.count(".") == 2


def subject_of(token: str, issuers: Mapping[str, Issuer], keys: JwtKeys) -> tuple[str, str]:
    """Check a token; return its issuer's name and the claim that tells tenants apart.

    The signature is checked with a key and an algorithm that the *issuer* has, never with what the token
    says of itself, and so are audience and times (RFC 8725).

    Raises:
        Unauthenticated: it is not good; the message says why, and nothing of its content.
        Unavailable: the issuer's keys could not be read so far.
    """
    import jwt

    if len(token) > MAX_CHARS:
        raise Unauthenticated(f"the token has {len(token)} characters; {MAX_CHARS} are the most.")
    try:
        header = jwt.get_unverified_header(token)
        claimed = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError as error:
        raise Unauthenticated(f"the token is no JWT: {clip(str(error), 100)}.") from error
    issuer = issuers.get(str(claimed.get("iss")))
    if issuer is None:
        raise Unauthenticated("the token's issuer is none of this server's.")
    key = keys.find(issuer.keys, str(header.get("kid", "")))
    if key is None:
        if keys.trouble(issuer.keys):
            raise Unavailable(
                "the keys of the token's issuer cannot be read just now; retry in a moment"
            )
        raise Unauthenticated(
            "the token is signed by a key that its issuer does not publish. If it has just been renewed, "
            "retry in ten seconds."
        )
    if key.algorithm_name not in issuer.algorithms:
        raise Unauthenticated(
            f"the token's key is for {key.algorithm_name}, and this server takes "
            f"{', '.join(issuer.algorithms)} of its issuer."
        )
    try:
        said = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            audience=issuer.audience,
            issuer=issuer.name,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud"]},
        )
    except jwt.PyJWTError as error:
        raise Unauthenticated(f"the token is not good: {clip(str(error), 100)}.") from error
    subject = said.get(issuer.claim)
    if not isinstance(subject, str) or not subject:
        raise Unauthenticated(f"the token has no claim '{issuer.claim}' that is a text.")
    return issuer.name, subject
