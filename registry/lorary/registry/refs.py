"""Refs: what a person writes to name a version of an adapter.

========================  =====================================================
``sentiment``             the newest version (alias ``latest``)
``sentiment@prod``        the version an alias points at
``sentiment@3``           a version by number
``sentiment@sha256:ab12`` a version by (the beginning of) its digest
``team/sentiment@prod``   an adapter of a team
========================  =====================================================

The grammar is narrow on purpose: a name is also a folder, a URL part and a metric label. The empty
text, which callers use for the bare base, is not a ref.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final

from lorary.errors import InvalidRef

LATEST: Final = "latest"
MAX_NAME: Final = 96
MAX_ALIAS: Final = 64
MAX_VERSION: Final = 999_999_999

_PART = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_ALIAS = re.compile(r"[a-z](?:[a-z0-9._-]*[a-z0-9])?")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{4,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """A parsed ref; exactly one of ``alias``, ``version`` and ``digest`` is set.

    Attributes:
        name: ``adapter`` or ``team/adapter``.
        alias: a movable pointer; ``latest`` when the ref is a bare name.
        version: a number, from 1.
        digest: ``sha256:`` and 4 to 64 hex digits, the beginning of a version's digest.
    """

    name: str
    alias: str | None = None
    version: int | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if sum(part is not None for part in (self.alias, self.version, self.digest)) != 1:
            raise InvalidRef(
                f"ref to {self.name!r} must have exactly one of alias, version and digest"
            )
        if self.alias is not None:
            check_alias(self.alias)
        if self.version is not None and not 1 <= self.version <= MAX_VERSION:
            raise InvalidRef(f"version {self.version} is out of range; 1 to {MAX_VERSION}")
        if self.digest is not None and not _DIGEST.fullmatch(self.digest):
            raise InvalidRef(
                f"digest {_shown(self.digest)} must be 'sha256:' and 4 to 64 lower-case hex digits"
            )

    def __str__(self) -> str:
        """Print the ref so that parsing it gives the same ref."""
        return f"{self.name}@{self.alias or self.version or self.digest}"


@functools.lru_cache(maxsize=8192)
def parse_ref(text: str) -> AdapterRef:
    """Parse what a person wrote; servers parse the same few refs in every call.

    Raises:
        InvalidRef: anything that is not exactly in the grammar of this module's table.
    """
    name, at, selector = text.partition("@")
    check_name(name)
    if not at:
        return AdapterRef(name=name, alias=LATEST)
    return _parse_selector(name, selector)


def parse_selector(name: str, selector: str) -> AdapterRef:
    """Parse the part after ``@`` (a leading ``@`` is accepted) for an adapter given apart.

    Raises:
        InvalidRef: it is neither an alias, nor a version, nor a digest.
    """
    return _parse_selector(check_name(name), selector.removeprefix("@"))


def _parse_selector(name: str, selector: str) -> AdapterRef:
    if _VERSION.fullmatch(selector):
        return AdapterRef(name=name, version=int(selector))
    if _DIGEST.fullmatch(selector):
        return AdapterRef(name=name, digest=selector)
    if len(selector) <= MAX_ALIAS and _is_word(_ALIAS, selector):
        return AdapterRef(name=name, alias=selector)
    raise InvalidRef(
        f"{_shown(selector)} after '@' is no alias (lower-case letters, digits, '-', '_', '.', "
        "beginning with a letter), no version (1, 2, 3 …) and no digest ('sha256:' and at least "
        "4 hex digits)"
    )


def check_name(name: str) -> str:
    """Return ``name`` if it can name an adapter.

    Raises:
        InvalidRef: it is empty, too long, or has other characters.
    """
    if len(name) > MAX_NAME:
        raise InvalidRef(
            f"adapter name {_shown(name)} has {len(name)} characters; the limit is {MAX_NAME}"
        )
    if not _is_word(_NAME, name):
        raise InvalidRef(
            f"adapter name {_shown(name)} is not valid; use lower-case letters and digits, with '-', "
            "'_' or '.' inside, and at most one '/' after a team: 'sentiment' or 'team/sentiment'"
        )
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` if it can name an alias (``latest`` included).

    Raises:
        InvalidRef: it is empty, too long, or has other characters.
    """
    if len(alias) > MAX_ALIAS or not _is_word(_ALIAS, alias):
        raise InvalidRef(
            f"alias {_shown(alias)} is not valid; use up to {MAX_ALIAS} lower-case letters, digits, "
            "'-', '_' and '.', beginning with a letter: 'prod', 'canary'"
        )
    return alias


def _is_word(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.fullmatch(text) is not None and ".." not in text


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}…'"
