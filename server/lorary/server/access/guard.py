"""The guard at the door: who calls, whether this method is theirs, and how much of it.

Methods are an allow-list of exact names: what is on no list is refused, so a method that is added
tomorrow, or a path that is spelled in another way, is closed until somebody opens it.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from lorary.errors import AccessDenied, LoraryError, Unauthenticated
from lorary.server.access import identity
from lorary.server.access.jwt_keys import JwtKeys
from lorary.server.access.jwt_tokens import looks_like_jwt, subject_of
from lorary.server.access.quotas import Quotas
from lorary.server.access.tokens import token_hash
from lorary.server.interceptors import Around, Undecodable
from lorary.server.status import clip
from lorary.v1 import control_pb2, inference_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from lorary.server.access.grants import GrantsFile, Tenant
    from lorary.server.interceptors import Context

audit = logging.getLogger("lorary.audit")

AUTHORIZATION = "authorization"
_SCHEME = "bearer "
# What a client certificate says of its holder, in gRPC's words.
_PEER_NAMES = ("x509_subject_alternative_name", "peer_spiffe_id")
MAX_AUDIT_CHARS = 200


def _methods(module: Any) -> frozenset[str]:
    """Return the full names of all methods that a module of stubs describes."""
    return frozenset(
        f"/{service.full_name}/{method.name}"
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    )


ADAPTER_HEALTH = "lorary.adapter/"
"""Health by adapter tells which there are, so it is the tenants' (``rollout.health``)."""
# By name, for its messages are registered only where that door is open (``open_inference``).
_OPEN_INFERENCE = "/inference.GRPCInferenceService/"
OPEN = _methods(health_pb2) | {_OPEN_INFERENCE + name for name in ("ServerLive", "ServerReady")}
"""For anybody: load balancers have no tokens."""
USERS = _methods(inference_pb2) | {
    _OPEN_INFERENCE + name
    for name in ("ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")
}
ADMINS = _methods(control_pb2) | _methods(reflection_pb2)


class Guard:
    """Says who calls, and holds their quotas; one for all doors of a server.

    Args:
        file: the tenants.
        quotas: what they use.
    """

    def __init__(self, file: GrantsFile, quotas: Quotas | None = None) -> None:
        self._file = file
        self._quotas = quotas or Quotas()
        self._keys = JwtKeys()
        self._issuers = file.grants.issuers
        self._keys.use(issuer.keys for issuer in self._issuers.values())
        # Once before the first call: a server that says it is ready knows whom to let in.
        self._keys.renew_due()

    def close(self) -> None:
        """Stop looking for issuers' keys."""
        self._keys.close()

    def identify(self, authorization: str | None, names: Sequence[str] = ()) -> Tenant:
        """Return who calls.

        Args:
            authorization: the header, ``Bearer`` and one of our tokens or an issuer's JWT; counts more
                than a certificate.
            names: alternative names of the caller's certificate, which TLS has verified.

        Raises:
            Unauthenticated: nobody that this server knows.
            Unavailable: it cannot be known just now, for an issuer's keys cannot be read.
        """
        grants = self._file.grants
        if grants.issuers is not self._issuers:
            self._issuers = grants.issuers
            self._keys.use(issuer.keys for issuer in grants.issuers.values())
        if authorization is not None:
            found = None
            if authorization[: len(_SCHEME)].lower() == _SCHEME:
                token = authorization[len(_SCHEME) :].strip()
                found = grants.by_token.get(token_hash(token))
                if found is None and grants.issuers and looks_like_jwt(token):
                    subject = subject_of(token, grants.issuers, self._keys)
                    found = grants.by_subject.get(subject)
                    if found is None:
                        raise Unauthenticated(
                            f"the token is good, and '{clip(subject[1], 100)}' is no tenant's here."
                        )
            if found is None:
                raise Unauthenticated(
                    "the token is not one of this server's. Check it for lost characters, or ask for a "
                    "new one; the header is 'authorization: Bearer lry_…'."
                )
            return found
        for name in names:
            if name in grants.by_certificate:
                return grants.by_certificate[name]
        if names:
            raise Unauthenticated(
                f"the client certificate's names ({clip(', '.join(names))}) are no tenant's here."
            )
        raise Unauthenticated(
            "this server answers tenants only, and the call carries no token. Set LORARY_TOKEN, pass "
            "token=… to the client, or send 'authorization: Bearer lry_…'."
        )

    @contextmanager
    def admitted(self, tenant: Tenant, *, role: str) -> Iterator[None]:
        """Make a tenant the current caller while a call runs, within its quotas.

        Raises:
            AccessDenied: the call is for another role.
            QuotaExceeded: it asks for too much just now.
        """
        if role == "admin" and tenant.role != "admin":
            raise AccessDenied(
                f"this call is for the role admin, and tenant '{tenant.name}' is a user."
            )
        # For as long as the call's task lives, which no other call shares.
        identity.current.set(tenant)
        with self._quotas.held(tenant):
            yield


class AccessInterceptor(Around):
    """Lets through whom the guard knows, and keeps an audit log of what admins do."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def around(
        self, method: str, request: Any, context: Context
    ) -> AbstractAsyncContextManager[None]:
        """Run a call as its tenant's."""
        return self._call(method, request, context)

    @asynccontextmanager
    async def _call(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        about = getattr(request, "service", "")
        if method in OPEN and not about.startswith(ADAPTER_HEALTH):
            yield
            return
        tenant = self._guard.identify(_authorization(context), _peer_names(context))
        if method not in OPEN | USERS | ADMINS:
            raise AccessDenied(f"'{clip(method, 100)}' is open to nobody on this server.")
        is_admins = method in ADMINS
        line = audited(
            tenant,
            method,
            lambda: str(request) if isinstance(request, Message | Undecodable) else "a stream",
        )
        with (
            line if is_admins else nullcontext(),
            self._guard.admitted(tenant, role="admin" if is_admins else "user"),
        ):
            yield


@contextmanager
def audited(tenant: Tenant, method: str, told: Callable[[], str]) -> Iterator[None]:
    """Leave a line of what somebody asked for that only admins may, and of how it ended.

    Args:
        tenant: who.
        method: of which call.
        told: returns what was asked; called at the end, when all of it has been read.
    """
    outcome = "ok"
    try:
        yield
    except LoraryError as error:
        outcome = type(error).__name__
        raise
    except BaseException:
        outcome = "failed"
        raise
    finally:
        said = clip(" ".join(told().split()), MAX_AUDIT_CHARS)
        audit.info("%s: %s {%s}: %s", tenant.name, method, said, outcome)


def _authorization(context: Context) -> str | None:
    metadata = dict(context.invocation_metadata() or ())
    value = metadata.get(AUTHORIZATION)
    return None if value is None else str(value)


def _peer_names(context: Context) -> list[str]:
    properties = context.auth_context()
    names = (value.decode() for key in _PEER_NAMES for value in properties.get(key, ()))
    return list(dict.fromkeys(names))
