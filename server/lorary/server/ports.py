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
    from lorary.registry.aliases import AliasMove
    from lorary.registry.manifest import BaseIdentity, Method, Task
    from lorary.registry.splits import Split
    from lorary.server.adapters.probe_runs import Verdict
    from lorary.server.engine.request import (
        Constraint,
        Execution,
        Lease,
        Output,
        Request,
        StepStats,
    )

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

    @property
    def method(self) -> Method:
        """How it was made; ``rank`` is the largest of its modules."""
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


class RolloutsLike(Protocol):
    """Canaries in the registry. Called from worker threads."""

    def all(self, name: str) -> Mapping[str, Split]:
        """Return the canaries of an adapter that run, by alias."""
        ...

    def of(self, name: str, alias: str) -> Split | None:
        """Return the canary of an alias, if one runs."""
        ...

    def stop(self, name: str, alias: str, *, expect: Split, reason: str, actor: str) -> object:
        """End a canary.

        Raises:
            Conflict: another one runs by now, or the alias was moved.
        """
        ...

    def promote(self, name: str, alias: str, *, expect: Split, reason: str, actor: str) -> object:
        """Point the alias at its canary; raises as ``stop``."""
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

    @property
    def rollouts(self) -> RolloutsLike:
        """The canaries behind aliases."""
        ...

    def trouble(self) -> str:
        """Return why answers may be out of date just now; empty if they are not."""
        ...

    def set_alias(
        self, name: str, alias: str, version: int | None, *, expect: Any, reason: str, actor: str
    ) -> Any:
        """Point an alias at a version, or remove it; see ``lorary.registry.store``."""
        ...

    def rollback(self, name: str, alias: str, *, expect: Any, reason: str, actor: str) -> Any:
        """Return an alias to where it pointed before its last move; see ``lorary.registry.store``."""
        ...

    def log(self, name: str) -> Sequence[AliasMove]:
        """Return the moves of all aliases of an adapter, oldest first.

        Raises:
            AdapterNotFound: no such adapter.
        """
        ...

    def list(self, name: str = "") -> Sequence[VersionLike]:
        """Return every version of an adapter, without a look at others; of every adapter if ``name`` is empty."""
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
    def num_pages(self) -> int:
        """Pages it takes on the device."""
        ...

    @property
    def num_holders(self) -> int:
        """Leases that hold it now."""
        ...


class HostStatsLike(Protocol):
    """What host memory holds of adapters, and how often it helped."""

    @property
    def num_adapters(self) -> int:
        """Copies that are kept."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes they take."""
        ...

    @property
    def num_hits(self) -> int:
        """Loads that found a copy."""
        ...

    @property
    def num_misses(self) -> int:
        """Loads that did not."""
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

    def prefetch(self, resolved: Any) -> None:
        """Begin to load an adapter that nobody needs yet; returns at once.

        Raises:
            LoraryError: what a load of this digest failed with a moment ago.
            Unavailable: the server is going down.
        """
        ...

    def check_fits(self, ranks: Mapping[str, int]) -> None:
        """Check that versions, ranks by digest, can be on the device together.

        Raises:
            IncompatibleAdapter: they cannot.
        """
        ...

    def load(self, resolved: Any, *, pin: bool = False) -> object:
        """Return when an adapter is resident, at once if it is held and ready; pin it if asked.

        Raises:
            LoraryError: why it cannot be loaded.
        """
        ...

    def readmit(self, digest: str) -> None:
        """Forget what was found wrong with a version, so that the next call loads it anew."""
        ...

    def verdict(self, digest: str) -> Verdict | None:
        """Return what came of a version's golden probes; None when they have not run."""
        ...

    def quarantined(self) -> Sequence[str]:
        """Return the digests that are refused until they are readmitted."""
        ...

    def unload(self, digest: str) -> object:
        """Unpin it and free it once nobody holds it; idempotent."""
        ...

    def pin(self, digest: str, *, pinned: bool = True) -> object | None:
        """Pin or unpin what is here or on its way; ``None`` when it is neither."""
        ...

    def listen(self, listener: Callable[[str, Any, str], object]) -> None:
        """Tell of every change: kind, what resolved, why. The listener returns at once."""
        ...

    def snapshot(self) -> Sequence[ResidentLike]:
        """Return what is resident, loading or unloading; callable from any thread."""
        ...

    def has_copy(self, digest: str) -> bool:
        """Whether host memory has a copy; callable from any thread."""
        ...

    def host_stats(self) -> HostStatsLike:
        """Return what host memory holds; callable from any thread."""
        ...


class CompositionsLike(Protocol):
    """Several versions at once; see ``lorary.server.adapters.composed``."""

    def acquire(
        self, digest: str, resolved: Mapping[str, Any], weights: Mapping[str, float]
    ) -> Lease:
        """Hold a composition: what the residency is asked for and the weight, by the digest of each part.

        Raises:
            LoraryError: what a load of a part failed with a moment ago.
        """
        ...


class MergedLike(Protocol):
    """The merged copy of one adapter."""

    @property
    def digest(self) -> str:
        """The version's digest."""
        ...

    @property
    def state(self) -> str:
        """``building``, ``ready`` or ``leaving``."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes it takes; 0 while it is built."""
        ...

    @property
    def num_holders(self) -> int:
        """Answers that run on it, or wait for it."""
        ...

    @property
    def verdict(self) -> Verdict | None:
        """What came of its golden probes; None before they have run."""
        ...


class MergingLike(Protocol):
    """Which adapter is merged; see ``lorary.server.adapters.merging``."""

    def hold(self, resolved: Any, lease: Lease, execution: Execution) -> Lease:
        """Return a lease for a request of this execution, in the place of one on its version.

        Raises:
            NotMergeable: the version cannot be merged here; ``lease`` is still the caller's.
            Unavailable: not now. Likewise.
        """
        ...

    def drop(self, digest: str) -> None:
        """Let a version's copy go when its running answers have ended."""
        ...

    def merged(self) -> MergedLike | None:
        """Return what is merged, or about to be."""
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

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The strings that are refused inside a caller's text."""
        ...

    def from_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Render messages with the base's chat template."""
        ...

    def render_chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_answered: bool = False,
    ) -> str:
        """Return turns as the base's chat template writes them; their contents are not checked."""
        ...

    def mark_id(self, text: str) -> int | None:
        """Return the id of a token that stands for itself and not for the letters of its text."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        ...

    def label_ids(self, label: str, *, field: str = "labels") -> tuple[int, ...]:
        """Return a label's ids as a completion; errors name ``field``."""
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

    def on_verify(self, name: str, verdict: Verdict) -> None:
        """One version's golden probes have run, or it has none."""
        ...

    def on_evict(self, cause: str) -> None:
        """One adapter left the device to make room, or because it was told to."""
        ...

    def on_merge(self, name: str, seconds: float, error: LoraryError | None) -> None:
        """One adapter is merged, or could not be."""
        ...

    def on_unmerge(self, cause: str) -> None:
        """One merged copy is let go of."""
        ...
