"""Which adapter a call means, and what the model reads: refs to versions, inputs to token ids.

Both may block (a registry on a network, a tokenizer on a long text), so both run on small thread
pools of their own; the event loop only waits.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lorary.errors import AdapterNotFound, IncompatibleAdapter, InvalidRequest
from lorary.server.access import identity
from lorary.server.recent import Recent
from lorary.server.tools.calling import Calling, with_short_ids
from lorary.server.tools.definitions import turns_of
from lorary.server.tools.template import AUTO, ToolTemplate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from lorary.registry.manifest import Method, Task
    from lorary.server.composition import Part
    from lorary.server.ports import ManifestLike, PromptsLike, RegistryLike
    from lorary.server.rollout.splits import Trial
    from lorary.server.router_metrics import AskedRefs
    from lorary.server.tools.definitions import Toolset
    from lorary.v1 import inference_pb2 as pb

log = logging.getLogger("lorary.server")

T = TypeVar("T")

NUM_REGISTRY_THREADS = 4
MAX_CACHED_TASKS = 4096
MAX_CACHED_LABELS, MAX_CACHED_CHARS = 256, 512
"""Of so many sets of labels the ids are remembered, if a set's text is no longer than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a call's ``adapter`` turned out to be; all but ``ref`` is empty for the bare base.

    ``parts`` are a composition's. Its digest is its own, ``resolved`` is None, and ``rank`` is the sum.

    Attributes:
        invocation: an aLoRA's tokens, which its prompts must hold.
        trial: the canary whose calls this one is among.
        is_canary: whether the canary answers it.
        is_shadowed: whether the canary gets a copy of it.
    """

    ref: str
    name: str = ""
    version: int = 0
    digest: str = ""
    task: Task | None = None
    resolved: Any = None
    parts: tuple[Part, ...] = ()
    rank: int = 0
    invocation: tuple[int, ...] = ()
    trial: Trial | None = None
    is_canary: bool = False
    is_shadowed: bool = False

    @property
    def is_activated(self) -> bool:
        """Whether it is the bare base up to its invocation (aLoRA): no change of weights computes that."""
        return bool(self.invocation)

    @property
    def lead(self) -> str:
        """The digest that the call counts against where adapters share the server."""
        return self.parts[0].digest if self.parts else self.digest

    @property
    def digests(self) -> tuple[str, ...]:
        """Of all versions that answer the call together."""
        return tuple(part.digest for part in self.parts) if self.parts else (self.digest,)


class Targets:
    """Resolves refs through the registry; remembers tasks by digest, which never changes.

    Args:
        registry: where refs become versions.
        base: name of the resident base, for messages.
        fingerprint: its fingerprint; versions made for another are refused.
    """

    def __init__(self, registry: RegistryLike, *, base: str, fingerprint: str) -> None:
        self._registry = registry
        self._base = base
        self._fingerprint = fingerprint
        self._pool = ThreadPoolExecutor(NUM_REGISTRY_THREADS, thread_name_prefix="lorary-registry")
        self._tasks: Recent[str, tuple[Task, Method]] = Recent(MAX_CACHED_TASKS)
        self._said: set[str] = set()
        self._follow: Callable[[str, str | None], Awaitable[Target]] | None = None
        self._asked: AskedRefs | None = None

    def follow(self, resolve: Callable[[str, str | None], Awaitable[Target]]) -> None:
        """Let ``resolve`` say what a ref means to callers (``rollout.aliases``)."""
        self._follow = resolve

    def note_asked(self, asked: AskedRefs) -> None:
        """Note in ``asked`` what callers write for a version from now on."""
        self._asked = asked

    async def resolve(self, ref: str, key: str | None = None) -> Target:
        """Return what ``ref`` means to the current caller: what is served, which follows what is registered.

        To a tenant, what is absent and what is not its own look the same.

        Args:
            ref: what the caller wrote.
            key: decides who is in a canary; ``None`` for the alias's holder.

        Raises:
            AdapterNotFound: no such version, or none that the current caller may see.
            AccessDenied: the current caller may not use the bare base.
            LoraryError: as ``lookup``.
        """
        if not ref:
            identity.check_base()
        if identity.current.get() is None:
            return await self._served(ref, key)
        # Asked first in any case, so that neither words nor time tell what exists.
        with suppress(AdapterNotFound):
            target = await self._served(ref, key)
            if not ref or identity.may_use(target.name):
                return target
        raise AdapterNotFound(
            f"adapter '{ref}' does not exist, or is not visible to tenant "
            f"'{identity.tenant_name()}'. Check the name; its administrator knows what is visible."
        )

    async def _served(self, ref: str, key: str | None) -> Target:
        follow = self._follow if ref else None
        target = await (self.lookup(ref) if follow is None else follow(ref, key))
        if self._asked is not None and target.digest:
            self._asked.note(ref, target.digest)
        return target

    async def lookup(self, ref: str) -> Target:
        """Return what ``ref`` means in the registry now, whoever asks.

        Raises:
            InvalidRef: it does not parse.
            AdapterNotFound: no such version.
            IncompatibleAdapter: it was made for another base.
        """
        if not ref:
            return Target(ref="")
        return await self.describe(ref, await self.run(self._registry.resolve, ref))

    async def describe(self, ref: str, resolved: Any) -> Target:
        """Return a version as the target of ``ref``; raises as ``lookup``."""
        if resolved.deprecated:
            self._say_deprecated(resolved)
        task, method = await self._task(resolved)
        return Target(
            ref=ref,
            name=resolved.name,
            version=resolved.version,
            digest=resolved.digest,
            task=task,
            resolved=resolved,
            rank=method.rank,
            invocation=method.invocation_tokens,
        )

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a blocking call of the registry on its threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """Stop the threads; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _say_deprecated(self, resolved: Any) -> None:
        """Log once that a deprecated version is asked for."""
        if resolved.digest in self._said or len(self._said) >= MAX_CACHED_TASKS:
            return
        self._said.add(resolved.digest)
        log.warning(
            "serving %s@%d, which was deprecated %s",
            resolved.name,
            resolved.version,
            resolved.deprecated,
        )

    async def _task(self, resolved: Any) -> tuple[Task, Method]:
        known = self._tasks.get(resolved.digest)
        if known is None:
            manifest = await self.run(self._registry.manifest, resolved)
            self._check_base(resolved, manifest)
            known = (manifest.task, manifest.method)
            self._tasks.put(resolved.digest, known)
        return known

    def _check_base(self, resolved: Any, manifest: ManifestLike) -> None:
        wanted = manifest.base
        if wanted.fingerprint != self._fingerprint:
            raise IncompatibleAdapter(
                f"adapter '{resolved.name}@{resolved.version}' was made for base '{wanted.name}' "
                f"({wanted.fingerprint[:19]}); this server runs '{self._base}' "
                f"({self._fingerprint[:19]}). Ask a server of that base."
            )


class Prompts:
    """Turns inputs into token ids on one thread: tokenizers do not like to be shared.

    Args:
        builder: the base's.
        decode: from ids to text.
        tool_format: how the base writes calls of tools; ``auto`` asks its chat template.
    """

    def __init__(
        self,
        builder: PromptsLike,
        decode: Callable[[list[int]], str],
        *,
        tool_format: str = AUTO,
    ) -> None:
        self._builder = builder
        self._decode = decode
        self._tools = ToolTemplate(builder, tool_format)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lorary-prompts")
        # Per tenant, or the time that a call takes would tell what labels others use.
        self._labels: Recent[tuple[str, tuple[str, ...]], tuple[tuple[int, ...], ...]] = Recent(
            MAX_CACHED_LABELS
        )

    async def calling(self, toolset: Toolset) -> Calling:
        """Return a call's tools in the form of the base.

        Raises:
            InvalidRequest: its chat template knows no tools, or writes calls in a form that is not known.
        """
        return Calling(toolset, await self._run(lambda: self._tools.form))

    async def token_ids(
        self, message: pb.Input, kind: str, target: Target, toolset: Toolset | None = None
    ) -> Sequence[int]:
        """Return the prompt's ids; ``kind`` is what ``validate.check_input`` said.

        Raises:
            InvalidRequest: the input does not suit the adapter or the base.
        """
        if kind == "token_ids":
            return tuple(message.token_ids.ids)
        if kind == "prompt":
            return await self._run(self._builder.from_prompt, message.prompt)
        if kind == "chat":
            task = target.task
            is_free = toolset is None and _is_for_task(message.chat)
            if is_free and task is not None and task.template is not None:
                return await self._run(
                    self._builder.from_task, task, {"text": message.chat.messages[0].content}
                )
            return await self._run(self._from_chat, message.chat, toolset)
        if target.task is None:
            raise InvalidRequest(
                "plain text needs an adapter whose task has a template, and this call is to the "
                "bare base. Name an adapter, or send prompt, chat or token_ids.",
                field="input.text",
            )
        return await self._run(self._builder.from_task, target.task, {"text": message.text})

    def _from_chat(self, chat: pb.ChatMessages, toolset: Toolset | None) -> list[int]:
        turns = turns_of(chat.messages)
        tools = [tool.told() for tool in toolset.tools] if toolset is not None else []
        # A template that knows nothing of calls would leave them out in silence.
        if (tools or any("tool_calls" in turn for turn in turns)) and (
            self._tools.form.format.has_short_ids
        ):
            turns = with_short_ids(turns)
        return self._builder.from_chat(turns, tools)

    async def label_ids(self, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return every label's ids; a task's are the same in every call, and then nobody waits for the thread.

        Raises:
            InvalidRequest: a label has no tokens, or two labels have the same.
        """
        key = identity.tenant_name(), tuple(labels)
        known = self._labels.get(key)
        if known is not None:
            return known
        ids = await self._run(lambda: tuple(self._builder.label_ids(label) for label in labels))
        for i, one in enumerate(ids):
            if not one or one in ids[:i]:
                why = "has no tokens" if not one else "has the same tokens as another"
                raise InvalidRequest(
                    f"label {labels[i][:64]!r} {why} and cannot be scored. Rename it.",
                    field=f"labels[{i}]",
                )
        if sum(map(len, labels)) <= MAX_CACHED_CHARS:
            self._labels.put(key, ids)
        return ids

    async def continuation_ids(
        self, texts: Sequence[str], *, with_end: bool
    ) -> tuple[tuple[int, ...], ...]:
        """Return the ids of every continuation, with the end token behind them if asked.

        Raises:
            InvalidRequest: one is empty, or holds a special token.
        """
        end = (self._builder.eos_id,) if with_end else ()

        def read() -> tuple[tuple[int, ...], ...]:
            numbered = enumerate(texts)
            return tuple(
                (*self._builder.label_ids(text, field=f"continuations[{i}]"), *end)
                for i, text in numbered
            )

        return await self._run(read)

    async def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token alone."""
        return await self._run(lambda: [self._decode([i]) for i in ids])

    async def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens together, special ones included."""
        return await self._run(self._decode, list(ids))

    def close(self) -> None:
        """Stop the thread; what has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


def _is_for_task(chat: pb.ChatMessages) -> bool:
    """Whether a conversation is one input, and its caller would have it in the adapter's template."""
    return chat.prefer_task and [m.role for m in chat.messages] == ["user"]
