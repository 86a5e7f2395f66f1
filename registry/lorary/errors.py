"""Every public error of Lorary, and the one table that says what each becomes at an edge.

The tree::

    LoraryError
    ├── InvalidRef (ValueError)            a ref that does not parse
    ├── InvalidRequest (ValueError)        a call that asks for something impossible
    ├── InvalidRecipe (ValueError)         a training recipe or its data is wrong
    ├── ConfigError (ValueError)           a process cannot start as it was told to
    ├── NotFound (LookupError)             no such adapter, version or alias
    │   ├── AdapterNotFound
    │   └── BaseNotFound
    ├── AlreadyExists                      the name is taken
    ├── Conflict                           somebody else moved it first (compare-and-swap)
    ├── Refused                            a rule of the registry is against it: a gate, a version in use
    ├── CorruptArtifact                    bytes differ from what was promised, or are not what they claim
    ├── IncompatibleAdapter (ValueError)   well formed, but not for this base or this server
    │   └── NotMergeable                   this server serves it, but cannot fold it into the base's weights
    ├── RegistryUnavailable                the registry cannot be reached just now
    ├── AccessDenied                       credentials are not enough
    │   └── Unauthenticated                credentials are missing, or unknown
    ├── StorageError (OSError)             disk full, read-only, no permission
    ├── MissingDependency (ImportError)    an extra or an asset package is not installed
    ├── Overloaded                         a queue or a budget is full; retrying is safe
    │   └── QuotaExceeded                  the caller's own share of it is
    ├── Unavailable                        draining, or still starting
    ├── DeadlineExceeded                   the caller's deadline has passed
    ├── Cancelled                          the caller went away
    ├── TrainingFailed                     loss became NaN, or training could not go on
    └── EngineFailed                       the engine broke; the process is going down

Wording of every message: what, with the value; why, or the limit; what to do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


class LoraryError(Exception):
    """Base of every error that Lorary raises on purpose; catch it to catch them all.

    Attributes:
        retry_after_s: an honest estimate, in seconds, of when a retry may succeed; None where there
            is none.
    """

    retry_after_s: float | None = None


class InvalidRef(LoraryError, ValueError):
    """A ref does not parse: wrong characters, a path, an empty part."""


class InvalidRequest(LoraryError, ValueError):
    """A call asks for something impossible.

    Attributes:
        field: dotted path of the offending field, as in the proto (``sampling.temperature``).
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidRecipe(LoraryError, ValueError):
    """A recipe has an unknown key, a value out of range, or its data lacks a column."""


class ConfigError(LoraryError, ValueError):
    """A process cannot start as configured: port in use, folder missing, bad flag."""


class NotFound(LoraryError, LookupError):
    """The thing named does not exist, or is not visible to the caller."""


class AdapterNotFound(NotFound):
    """No such adapter, version, alias or digest in the registry."""


class BaseNotFound(NotFound):
    """The base model can be found neither in the catalogue, nor as a folder, nor on the Hub."""


class AlreadyExists(LoraryError):
    """The name, version or alias exists and may not be replaced."""


class Conflict(LoraryError):
    """Another writer was first; nothing was changed. Read again and retry."""


class Refused(LoraryError):
    """A rule of the registry is against it: a requirement not met, a protected alias, a version in use."""


class CorruptArtifact(LoraryError):
    """Bytes do not match their digest, or a file is not what its name claims."""


class IncompatibleAdapter(LoraryError, ValueError):
    """A well-formed adapter that this base or this server cannot carry."""


class NotMergeable(IncompatibleAdapter):
    """An adapter that this server serves, but cannot fold into its base's weights."""


class RegistryUnavailable(LoraryError):
    """The registry cannot be reached just now."""


class AccessDenied(LoraryError):
    """Credentials are missing or do not allow this."""


class Unauthenticated(AccessDenied):
    """Nobody knows who calls: there are no credentials, or unknown ones."""


class StorageError(LoraryError, OSError):
    """A folder is missing or read-only, or the disk is full."""


class MissingDependency(LoraryError, ImportError):
    """An extra or an asset package is needed; the message says what to run."""


class Overloaded(LoraryError):
    """A queue or a budget is full, or memory is; retrying later is safe.

    Attributes:
        retry_after_s: an honest estimate, in seconds, of when a retry may succeed.
    """

    retry_after_s: float

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(Overloaded):
    """A tenant asks for more than its share; others are not concerned.

    Attributes:
        subject: whose, and of what: ``tenant:acme/calls``.
    """

    def __init__(self, message: str, *, subject: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.subject = subject


class Unavailable(LoraryError):
    """The server is draining or not ready; another replica may answer.

    Attributes:
        retry_after_s: an honest estimate, in seconds, of when a retry may succeed.
    """

    retry_after_s: float

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(LoraryError):
    """The caller's deadline passed before the work was done."""


class Cancelled(LoraryError):
    """The caller cancelled or disconnected."""


class TrainingFailed(LoraryError):
    """Training cannot go on: the loss is not finite, or memory ran out."""


class EngineFailed(LoraryError):
    """A step raised; its requests are lost and the server reports itself unhealthy."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an error becomes: the gRPC status' name, and a process' exit code."""

    grpc_status: str
    exit_code: int

    @property
    def http_status(self) -> int:
        """The status code over HTTP."""
        return HTTP_STATUSES[self.grpc_status]


HTTP_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "DATA_LOSS": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""Of every gRPC status that an error has; 499 is nginx' word for a caller who went away."""


# The most specific class wins (walk the MRO). Exit codes: 1 unexpected, 2 usage, 3 not found,
# 4 conflict, 5 integrity, 6 unavailable, 7 access, 8 storage, 9 incompatible, 70 engine,
# 78 configuration, 130 interrupted.
OUTCOMES: dict[type[LoraryError], Outcome] = {
    LoraryError: Outcome("INTERNAL", 1),
    InvalidRef: Outcome("INVALID_ARGUMENT", 2),
    InvalidRequest: Outcome("INVALID_ARGUMENT", 2),
    InvalidRecipe: Outcome("INVALID_ARGUMENT", 2),
    ConfigError: Outcome("FAILED_PRECONDITION", 78),
    NotFound: Outcome("NOT_FOUND", 3),
    AdapterNotFound: Outcome("NOT_FOUND", 3),
    BaseNotFound: Outcome("NOT_FOUND", 3),
    AlreadyExists: Outcome("ALREADY_EXISTS", 4),
    Conflict: Outcome("ABORTED", 4),
    Refused: Outcome("FAILED_PRECONDITION", 4),
    CorruptArtifact: Outcome("DATA_LOSS", 5),
    IncompatibleAdapter: Outcome("FAILED_PRECONDITION", 9),
    NotMergeable: Outcome("FAILED_PRECONDITION", 9),
    RegistryUnavailable: Outcome("UNAVAILABLE", 6),
    AccessDenied: Outcome("PERMISSION_DENIED", 7),
    Unauthenticated: Outcome("UNAUTHENTICATED", 7),
    StorageError: Outcome("UNAVAILABLE", 8),
    MissingDependency: Outcome("FAILED_PRECONDITION", 78),
    Overloaded: Outcome("RESOURCE_EXHAUSTED", 6),
    QuotaExceeded: Outcome("RESOURCE_EXHAUSTED", 6),
    Unavailable: Outcome("UNAVAILABLE", 6),
    DeadlineExceeded: Outcome("DEADLINE_EXCEEDED", 6),
    Cancelled: Outcome("CANCELLED", 130),
    TrainingFailed: Outcome("INTERNAL", 1),
    EngineFailed: Outcome("INTERNAL", 70),
}


def outcome(error: BaseException) -> Outcome:
    """Return what ``error`` becomes at an edge; anything that is not ours is INTERNAL, exit 1."""
    for cls in type(error).__mro__:
        if cls in OUTCOMES:
            return OUTCOMES[cls]
    return OUTCOMES[LoraryError]


def reason(cls: type[LoraryError]) -> str:
    """Return an error class' name on the wire: ``AdapterNotFound`` is ``ADAPTER_NOT_FOUND``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()
