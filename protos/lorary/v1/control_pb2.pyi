from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_UNSPECIFIED: _ClassVar[Residency]
    RESIDENCY_REGISTRY: _ClassVar[Residency]
    RESIDENCY_LOADING: _ClassVar[Residency]
    RESIDENCY_RESIDENT: _ClassVar[Residency]
    RESIDENCY_UNLOADING: _ClassVar[Residency]

class UnloadMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNLOAD_MODE_UNSPECIFIED: _ClassVar[UnloadMode]
    UNLOAD_MODE_DRAIN: _ClassVar[UnloadMode]
    UNLOAD_MODE_FORCE: _ClassVar[UnloadMode]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_LOADING: _ClassVar[EventKind]
    EVENT_KIND_RESIDENT: _ClassVar[EventKind]
    EVENT_KIND_LOAD_FAILED: _ClassVar[EventKind]
    EVENT_KIND_EVICTED: _ClassVar[EventKind]
    EVENT_KIND_UNLOADING: _ClassVar[EventKind]
    EVENT_KIND_PINNED: _ClassVar[EventKind]
    EVENT_KIND_UNPINNED: _ClassVar[EventKind]
    EVENT_KIND_ALIAS_MOVED: _ClassVar[EventKind]
    EVENT_KIND_ALIAS_BEHIND: _ClassVar[EventKind]
    EVENT_KIND_CANARY_STARTED: _ClassVar[EventKind]
    EVENT_KIND_CANARY_ENDED: _ClassVar[EventKind]
    EVENT_KIND_CANARY_PROMOTED: _ClassVar[EventKind]
    EVENT_KIND_REGISTRY_AWAY: _ClassVar[EventKind]
    EVENT_KIND_REGISTRY_BACK: _ClassVar[EventKind]
RESIDENCY_UNSPECIFIED: Residency
RESIDENCY_REGISTRY: Residency
RESIDENCY_LOADING: Residency
RESIDENCY_RESIDENT: Residency
RESIDENCY_UNLOADING: Residency
UNLOAD_MODE_UNSPECIFIED: UnloadMode
UNLOAD_MODE_DRAIN: UnloadMode
UNLOAD_MODE_FORCE: UnloadMode
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_LOADING: EventKind
EVENT_KIND_RESIDENT: EventKind
EVENT_KIND_LOAD_FAILED: EventKind
EVENT_KIND_EVICTED: EventKind
EVENT_KIND_UNLOADING: EventKind
EVENT_KIND_PINNED: EventKind
EVENT_KIND_UNPINNED: EventKind
EVENT_KIND_ALIAS_MOVED: EventKind
EVENT_KIND_ALIAS_BEHIND: EventKind
EVENT_KIND_CANARY_STARTED: EventKind
EVENT_KIND_CANARY_ENDED: EventKind
EVENT_KIND_CANARY_PROMOTED: EventKind
EVENT_KIND_REGISTRY_AWAY: EventKind
EVENT_KIND_REGISTRY_BACK: EventKind

class Adapter(_message.Message):
    __slots__ = ("name", "version", "digest", "aliases", "residency", "pinned", "rank", "device_bytes", "num_running", "task", "verified", "verified_divergence", "verified_limit", "quarantined", "num_served", "last_used_unix_ms", "canaries", "num_pages", "merged", "merged_bytes", "merged_running", "merged_divergence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_LIMIT_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    NUM_SERVED_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    CANARIES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    MERGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MERGED_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MERGED_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    digest: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    residency: Residency
    pinned: bool
    rank: int
    device_bytes: int
    num_running: int
    task: str
    verified: str
    verified_divergence: float
    verified_limit: float
    quarantined: bool
    num_served: int
    last_used_unix_ms: int
    canaries: _containers.RepeatedCompositeFieldContainer[CanaryShare]
    num_pages: int
    merged: str
    merged_bytes: int
    merged_running: int
    merged_divergence: float
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., residency: _Optional[_Union[Residency, str]] = ..., pinned: bool = ..., rank: _Optional[int] = ..., device_bytes: _Optional[int] = ..., num_running: _Optional[int] = ..., task: _Optional[str] = ..., verified: _Optional[str] = ..., verified_divergence: _Optional[float] = ..., verified_limit: _Optional[float] = ..., quarantined: bool = ..., num_served: _Optional[int] = ..., last_used_unix_ms: _Optional[int] = ..., canaries: _Optional[_Iterable[_Union[CanaryShare, _Mapping]]] = ..., num_pages: _Optional[int] = ..., merged: _Optional[str] = ..., merged_bytes: _Optional[int] = ..., merged_running: _Optional[int] = ..., merged_divergence: _Optional[float] = ...) -> None: ...

class CanaryShare(_message.Message):
    __slots__ = ("alias", "percent", "shadow")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    alias: str
    percent: float
    shadow: float
    def __init__(self, alias: _Optional[str] = ..., percent: _Optional[float] = ..., shadow: _Optional[float] = ...) -> None: ...

class CallTally(_message.Message):
    __slots__ = ("num_calls", "num_errors", "first_token_p95_s")
    NUM_CALLS_FIELD_NUMBER: _ClassVar[int]
    NUM_ERRORS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_P95_S_FIELD_NUMBER: _ClassVar[int]
    num_calls: int
    num_errors: int
    first_token_p95_s: float
    def __init__(self, num_calls: _Optional[int] = ..., num_errors: _Optional[int] = ..., first_token_p95_s: _Optional[float] = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("name", "alias", "holder_version", "canary_version", "percent", "shadow", "state", "problem", "holder", "canary", "num_compared", "num_same", "divergence", "since")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_VERSION_FIELD_NUMBER: _ClassVar[int]
    CANARY_VERSION_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPARED_FIELD_NUMBER: _ClassVar[int]
    NUM_SAME_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    holder_version: int
    canary_version: int
    percent: float
    shadow: float
    state: str
    problem: str
    holder: CallTally
    canary: CallTally
    num_compared: int
    num_same: int
    divergence: float
    since: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., holder_version: _Optional[int] = ..., canary_version: _Optional[int] = ..., percent: _Optional[float] = ..., shadow: _Optional[float] = ..., state: _Optional[str] = ..., problem: _Optional[str] = ..., holder: _Optional[_Union[CallTally, _Mapping]] = ..., canary: _Optional[_Union[CallTally, _Mapping]] = ..., num_compared: _Optional[int] = ..., num_same: _Optional[int] = ..., divergence: _Optional[float] = ..., since: _Optional[str] = ...) -> None: ...

class BehindAlias(_message.Message):
    __slots__ = ("ref", "version", "reason")
    REF_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ref: str
    version: int
    reason: str
    def __init__(self, ref: _Optional[str] = ..., version: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("resident_only",)
    RESIDENT_ONLY_FIELD_NUMBER: _ClassVar[int]
    resident_only: bool
    def __init__(self, resident_only: bool = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "rollouts", "behind", "registry_trouble")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_TROUBLE_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    behind: _containers.RepeatedCompositeFieldContainer[BehindAlias]
    registry_trouble: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ..., behind: _Optional[_Iterable[_Union[BehindAlias, _Mapping]]] = ..., registry_trouble: _Optional[str] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("adapter", "pin")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    pin: bool
    def __init__(self, adapter: _Optional[str] = ..., pin: bool = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter", "load_ns")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LOAD_NS_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    load_ns: int
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., load_ns: _Optional[int] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("adapter", "mode")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    mode: UnloadMode
    def __init__(self, adapter: _Optional[str] = ..., mode: _Optional[_Union[UnloadMode, str]] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter", "rollout")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    rollout: Rollout
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., rollout: _Optional[_Union[Rollout, _Mapping]] = ...) -> None: ...

class PrefetchAdapterRequest(_message.Message):
    __slots__ = ("adapter", "wait")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    wait: bool
    def __init__(self, adapter: _Optional[str] = ..., wait: bool = ...) -> None: ...

class PrefetchAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class PinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class UnpinAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class UnpinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Event(_message.Message):
    __slots__ = ("kind", "name", "version", "digest", "alias", "detail", "at_unix_ms")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    kind: EventKind
    name: str
    version: int
    digest: str
    alias: str
    detail: str
    at_unix_ms: int
    def __init__(self, kind: _Optional[_Union[EventKind, str]] = ..., name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., alias: _Optional[str] = ..., detail: _Optional[str] = ..., at_unix_ms: _Optional[int] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("snapshot", "event", "num_lost")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    NUM_LOST_FIELD_NUMBER: _ClassVar[int]
    snapshot: ListAdaptersResponse
    event: Event
    num_lost: int
    def __init__(self, snapshot: _Optional[_Union[ListAdaptersResponse, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., num_lost: _Optional[int] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "version", "expect_version", "reason", "actor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    version: int
    expect_version: int
    reason: str
    actor: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., version: _Optional[int] = ..., expect_version: _Optional[int] = ..., reason: _Optional[str] = ..., actor: _Optional[str] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("from_version", "to_version")
    FROM_VERSION_FIELD_NUMBER: _ClassVar[int]
    TO_VERSION_FIELD_NUMBER: _ClassVar[int]
    from_version: int
    to_version: int
    def __init__(self, from_version: _Optional[int] = ..., to_version: _Optional[int] = ...) -> None: ...
