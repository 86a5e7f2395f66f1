"""What the server's edge needs of its inner parts, as protocols, so that each can be faked.

``Engine`` (lorary.server.engine), ``Residency`` (lorary.server.adapters), ``Registry``
(lorary.registry) and ``PromptBuilder`` (lorary.bases) fit these without knowing them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from lorary.errors import LoraryError
    from lorary.registry.manifest import BaseIdentity, Task
    from lorary.server.engine.request import Constraint, Lease, Output, Request, StepStats

    Deliver = Callable[[list[Output]], None]


class ResolvedLike(Protocol):
    """What a ref stands for right now."""

    @property
    def name(self) -> str:
        """The adapter's name."""
        ...

    @property
    def version(self) -> int:
        """The version's number."""
        ...

    @property
    def digest(self) -> str:
        """The version's digest, ``sha256:…``."""
        ...


class ManifestLike(Protocol):
    """The part of a manifest that a call needs."""

    @property
    def base(self) -> BaseIdentity:
        """Which base the version was made for."""
        ...

    @property
    def task(self) -> Task:
        """Template, labels, stop strings, default number of tokens."""
        ...


class VersionLike(Protocol):
    """One row of the registry's list."""

    @property
    def name(self) -> str:
        """The adapter's name."""
        ...

    @property
    def version(self) -> int:
        """The version's number."""
        ...

    @property
    def digest(self) -> str:
        """The version's digest."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]:
        """Aliases that point at it."""
        ...

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        ...

    @property
    def task_kind(self) -> str:
        """``generation`` or ``classification``."""
        ...


class RegistryLike(Protocol):
    """Where refs become versions. Called from worker threads, several at once."""

    def resolve(self, ref: str) -> Any:
        """Return a ``ResolvedLike``.

        Raises:
            InvalidRef: it does not parse.
            AdapterNotFound: there is no such version.
            RegistryUnavailable: it cannot be told just now.
        """
        ...

    def manifest(self, resolved: Any) -> Any:
        """Return a ``ManifestLike``; raises as ``resolve``, and CorruptArtifact."""
        ...

    def list(self) -> Sequence[VersionLike]:
        """Return every version of every adapter."""
        ...


class ResidentLike(Protocol):
    """One adapter on the device, or on its way to or from it."""

    @property
    def name(self) -> str:
        """The adapter's name."""
        ...

    @property
    def version(self) -> int:
        """The version's number."""
        ...

    @property
    def digest(self) -> str:
        """The version's digest."""
        ...

    @property
    def state(self) -> str:
        """``loading``, ``resident`` or ``unloading``."""
        ...

    @property
    def pinned(self) -> bool:
        """Whether it is never evicted."""
        ...

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        ...

    @property
    def device_bytes(self) -> int:
        """Bytes it takes on the device."""
        ...

    @property
    def num_holders(self) -> int:
        """Leases that hold it now."""
        ...


class ResidencyLike(Protocol):
    """Which adapters are on the device."""

    def acquire(self, resolved: Any) -> Lease:
        """Hold an adapter; returns at once, and starts a load when it is not there.

        Raises:
            LoraryError: what a load of this digest failed with a moment ago.
            Unavailable: the server is going down.
        """
        ...

    def load(self, resolved: Any, *, pin: bool = False) -> object:
        """Return when an adapter is resident, at once if it is held and ready; pin it if asked.

        Raises:
            LoraryError: why it cannot be loaded.
        """
        ...

    def unload(self, digest: str) -> object:
        """Unpin it and free it once nobody holds it; idempotent."""
        ...

    def snapshot(self) -> Sequence[ResidentLike]:
        """Return what is resident, loading or unloading; callable from any thread."""
        ...


class EngineLike(Protocol):
    """The thread that owns the device. It answers through the ``deliver`` it was built with."""

    def start(self) -> None:
        """Start the thread."""
        ...

    def submit(self, request: Request) -> None:
        """Take a request and its lease, which the engine releases; callable from any thread.

        Raises:
            Overloaded: the queue is full. Nothing was taken, the lease is still the caller's.
            Unavailable: the engine is stopping. Likewise.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Drop every answer of a request at the next step; unknown ids are ignored."""
        ...

    def shutdown(self) -> None:
        """Stop the thread and wait for it; idempotent."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that have a place in the steps."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place or for their adapter."""
        ...


class PromptsLike(Protocol):
    """From what a caller sends to token ids; see ``lorary.bases.prompts``."""

    def from_task(self, task: Task, inputs: Mapping[str, str]) -> list[int]:
        """Render the task's template over the inputs."""
        ...

    def from_prompt(self, text: str) -> list[int]:
        """Tokenize a complete prompt."""
        ...

    def from_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Render messages with the base's chat template."""
        ...

    def label_ids(self, label: str) -> tuple[int, ...]:
        """Return a label's ids as a completion."""
        ...


class CompilerLike(Protocol):
    """From constraints to grammars; see ``lorary.server.engine.constraints``."""

    def submit(self, constraint: Constraint) -> Future[Any]:
        """Return what will be a constraint's ``Grammar``, or InvalidRequest."""
        ...


class Observer(Protocol):
    """What the engine and the residency report to, from their own threads."""

    def on_step(self, stats: StepStats) -> None:
        """One step has ended."""
        ...

    def on_error(self, error: BaseException) -> None:
        """The engine broke; no further step will come."""
        ...

    def on_load(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """One load has ended, well or not."""
        ...

    def on_evict(self, cause: str) -> None:
        """One adapter left the device to make room, or because it was told to."""
        ...
