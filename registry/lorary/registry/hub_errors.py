"""What a Hub's refusals and a network's failures become.

=======================================  =====================  ====
what happened                            error                  exit
=======================================  =====================  ====
401, 403, a gated repository             ``AccessDenied``       7
404                                      ``AdapterNotFound``    3
409, 412                                 ``Conflict``           4
413, 507, no room on this machine        ``StorageError``       8
400, 422                                 ``InvalidRequest``     2
429, 5xx, time-out, no route, offline    ``RegistryUnavailable``  6
=======================================  =====================  ====
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any, Final

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
)

from lorary.errors import (
    AccessDenied,
    AdapterNotFound,
    Conflict,
    InvalidRef,
    InvalidRequest,
    LoraryError,
    RegistryUnavailable,
    StorageError,
)

# The client's HTTP library has had several names; its base class is the first base of theirs.
_TRANSPORT_ERROR: Final[type[Exception]] = HfHubHTTPError.__mro__[1]
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_MAX_TEXT: Final = 300


class StaleHead(Exception):
    """A commit was refused because the repository has moved on; read again and retry."""


@contextlib.contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn what the Hub's client raises inside the block into an error of Lorary's.

    Args:
        doing: what was being done, for the message: ``"read acme/sentiment"``.
    """
    try:
        yield
    except (LoraryError, StaleHead):
        raise
    except (_TRANSPORT_ERROR, EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise translated(error, doing) from error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, ``None`` if no answer came."""
    found = _answered(error)
    return None if found is None else int(found.response.status_code)


def translated(error: Exception, doing: str) -> LoraryError:
    """Return what an error of the Hub's client is to Lorary."""
    answer = _answered(error)
    if answer is not None:
        return _by_status(answer, doing)
    if isinstance(error, HFValidationError):
        return InvalidRef(f"cannot {doing}: {_short(error)}")
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return RegistryUnavailable(
                f"cannot {doing}: HF_HUB_OFFLINE is set; unset it to reach the hub"
            )
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            return StorageError(f"cannot {doing}: {cause.strerror}; make room, or give permission")
    causes = list(_chain(error))
    root = next((c for c in causes if isinstance(c, _TRANSPORT_ERROR)), causes[-1])
    return RegistryUnavailable(
        f"cannot {doing}: {_short(root) or type(root).__name__}. Check HF_ENDPOINT and the network; "
        "nothing was changed, retrying is safe."
    )


def _by_status(error: Any, doing: str) -> LoraryError:
    status = int(error.response.status_code)
    said = _short(error.server_message or error)
    if isinstance(error, GatedRepoError):
        return AccessDenied(
            f"cannot {doing}: the repository is gated, and this account has not been let in "
            f"({said}). Ask its owner for access."
        )
    if status in (401, 403):
        return AccessDenied(
            f"cannot {doing}: the hub answered {status} ({said}). It is private, does not exist, or "
            "the token may not do this; set HF_TOKEN, or run `hf auth login`."
        )
    if status == 404:
        return AdapterNotFound(f"cannot {doing}: the hub has no such thing ({said})")
    if status in (409, 412):
        return Conflict(f"cannot {doing}: {said}")
    if status in (413, 507):
        return StorageError(f"cannot {doing}: the hub has no room for it ({said})")
    if status == 429 or status >= 500:
        wait = _retry_after(error)
        return RegistryUnavailable(
            f"cannot {doing}: the hub answered {status} ({said}). Retry "
            f"{f'after {wait} s' if wait else 'later'}; nothing was changed."
        )
    return InvalidRequest(f"cannot {doing}: the hub answered {status} ({said})")


def _retry_after(error: Any) -> str:
    headers = error.response.headers
    plain = headers.get("retry-after", "").strip()
    if plain.isdigit():
        return str(plain)
    fields = dict(
        part.strip().split("=", 1)
        for part in headers.get("ratelimit", "").split(";")
        if "=" in part
    )
    reset = fields.get("t", "").strip()
    return reset if reset.isdigit() else ""


def _answered(error: BaseException) -> Any:
    return next(
        (
            cause
            for cause in _chain(error)
            if isinstance(cause, HfHubHTTPError) and cause.response is not None
        ),
        None,
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _short(text: object) -> str:
    shown = " ".join(str(text).split()).rstrip(".")
    return shown if len(shown) <= _MAX_TEXT else f"{shown[: _MAX_TEXT - 1]}…"
