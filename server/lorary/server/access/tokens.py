"""Tokens: 256 random bits that a server knows only the hash of."""

from __future__ import annotations

import hashlib
import secrets

PREFIX = "lry_"
"""Lets scanners for leaked secrets recognise one."""


def new_token() -> str:
    """Return a new token: ``lry_`` and 43 characters that are safe in a header and in a shell."""
    return PREFIX + secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """Return what is kept of a token: its sha256, in hex.

    A plain hash is enough: nobody guesses 256 random bits, so there is nothing to slow down.
    """
    return hashlib.sha256(token.encode()).hexdigest()
