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
RESIDENCY_UNSPECIFIED: Residency
RESIDENCY_REGISTRY: Residency
RESIDENCY_LOADING: Residency
RESIDENCY_RESIDENT: Residency
RESIDENCY_UNLOADING: Residency

class Adapter(_message.Message):
    __slots__ = ("name", "version", "digest", "aliases", "residency", "pinned", "rank", "device_bytes", "num_running", "task", "verified", "verified_divergence", "verified_limit", "quarantined")
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
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., residency: _Optional[_Union[Residency, str]] = ..., pinned: bool = ..., rank: _Optional[int] = ..., device_bytes: _Optional[int] = ..., num_running: _Optional[int] = ..., task: _Optional[str] = ..., verified: _Optional[str] = ..., verified_divergence: _Optional[float] = ..., verified_limit: _Optional[float] = ..., quarantined: bool = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("resident_only",)
    RESIDENT_ONLY_FIELD_NUMBER: _ClassVar[int]
    resident_only: bool
    def __init__(self, resident_only: bool = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

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
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...
