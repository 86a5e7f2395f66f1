"""The data plane: decode, submit, stream, encode; no torch. gRPC calls it, and so does the HTTP door.

The life of one ``Generate`` call:

1. It is admitted, or refused before any work (queue full, draining).
2. Its fields are checked; a bad one ends the call with its path.
3. Its ref becomes a version and a digest; the digest goes into the trailing metadata.
4. Its input becomes token ids, with the adapter's own template.
5. One ``Request`` with a ``Lease`` of its own per answer goes to the engine.
6. Outputs arrive through ``Calls`` and leave as chunks, then one complete event per answer.
7. Whatever ends the call early cancels what still runs: an error, or a ``CancelledError`` at
   whichever ``await`` is current (the caller cancelled, its deadline passed, it is gone).

Who releases a lease: ``[acquire, submit)`` the service; ``[submit, end of the answer)`` the engine,
which alone knows when no step reads the adapter any more.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, cast

from lorary.errors import DeadlineExceeded, InvalidRequest, LoraryError, NotMergeable
from lorary.registry.invocation import active_from
from lorary.server import answers, validate
from lorary.server.access.identity import tenant_name
from lorary.server.adapters.merging import MergeLease, hold_version
from lorary.server.adapters.residency import BaseLease
from lorary.server.composition import read_adapters, resolve_adapters, summed
from lorary.server.current_call import current_call, request_id
from lorary.server.engine.request import Constraint, Request, Sampling
from lorary.server.frames import joined
from lorary.server.interceptors import add_trailing, set_request_id
from lorary.server.rollout.shadow import Prepared
from lorary.server.stalls import Writer
from lorary.server.together import together
from lorary.server.tools.definitions import check_options, read_toolset
from lorary.server.tools.grammar import closed_schema
from lorary.server.tracing.span import current_span, watched
from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from lorary.server.answers import ServerFacts
    from lorary.server.caller import Caller, Facts, Waiting
    from lorary.server.calls import Calls
    from lorary.server.composition import HasAdapters
    from lorary.server.engine.request import Execution, Finish, Grammar, Lease, Output
    from lorary.server.mailbox import Mailbox
    from lorary.server.metrics import ServerMetrics
    from lorary.server.ports import (
        CompilerLike,
        CompositionsLike,
        EngineLike,
        MergingLike,
        ResidencyLike,
    )
    from lorary.server.rollout.build import Rollout
    from lorary.server.rollout.observed import Observation
    from lorary.server.targets import Prompts, Target, Targets
    from lorary.server.tools.definitions import Toolset
    from lorary.server.tools.reader import CallReader

    Context = Caller
    OneInput = pb.GenerateRequest | pb.ClassifyRequest | pb.ScoreRequest
    AdapterCall = OneInput | pb.EmbedRequest
    # Texts, and the ids of each.
    _Continuations = tuple[Sequence[str], tuple[tuple[int, ...], ...]]

Told = TypeVar("Told")

ADAPTER_KEY = "lorary-adapter"
VERSION_KEY = "lorary-adapter-version"
DIGEST_KEY = "lorary-adapter-digest"
EMBED_WINDOW = 64
"""Inputs of one call that are with the engine at once: its steps are full, and its queue is left to others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the service works with."""

    engine: EngineLike
    residency: ResidencyLike
    compositions: CompositionsLike
    targets: Targets
    prompts: Prompts
    grammars: CompilerLike
    calls: Calls
    metrics: ServerMetrics
    facts: ServerFacts
    limits: validate.Limits
    rollout: Rollout
    stall_s: float
    merging: MergingLike | None = None


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """``lorary.v1.Inference``."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Stream chunks and one complete event per answer."""
        arrived_s = time.monotonic()
        with self._parts.calls.admitted():
            self._check(request, context)
            kind = self._check_input(request)
            sampling, num_answers = validate.read_sampling(request.sampling, self._parts.limits)
            toolset = _toolset(request.input, request.sampling)
            target, execution = await self._chosen(request, context)
            if target.is_shadowed and sampling.seed is None:
                # A sampled answer and its copy can only be compared when they draw alike.
                sampling = replace(sampling, seed=secrets.randbits(63))

            calling = None if toolset is None else await self._parts.prompts.calling(toolset)

            async def prepare(target: Target) -> Prepared:
                prompt_ids = await self._prompt_ids(request.input, kind, target, toolset=toolset)
                complete = validate.complete(
                    sampling, request.sampling, target.task, len(prompt_ids), self._parts.limits
                )
                if calling is not None:
                    # The task's stop strings end answers of its own template, not calls.
                    complete = calling.constrained(replace(complete, stop=sampling.stop))
                prototype = self._request(prompt_ids, complete, arrived_s, context)
                prototype.active_from = await self._active_from(target, prompt_ids)
                prototype.priority = request.priority
                if complete.constraint is not None:
                    prototype.grammar = await self._compiled(complete.constraint, toolset)
                return Prepared(request=prototype)

            with self._parts.rollout.observer.observed(target) as observation:
                prepared = await prepare(target)
                prototype = prepared.request
                readers = [calling.reader() if calling else None for _ in range(num_answers)]
                with (
                    self._parts.rollout.shadows.copying(target, prepared, observation, prepare),
                    self._running(target, prototype, num_answers, execution) as outputs,
                ):
                    await self._stream(outputs, target, prototype, readers, observation, context)

    async def Classify(  # noqa: N802
        self, request: pb.ClassifyRequest, context: Waiting
    ) -> pb.ClassifyResponse:
        """Score every label in one prefill."""

        async def read(target: Target) -> _Continuations:
            labels = validate.read_labels(request.labels, target.task)
            return labels, await self._parts.prompts.label_ids(labels)

        def tell(prepared: Prepared, finish: Finish) -> list[pb.LabelScore]:
            return answers.label_scores(prepared.labels, finish.label_logprobs)

        scores, usage, receipt = await self._scored(request, context, read, tell)
        return pb.ClassifyResponse(scores=scores, usage=usage, receipt=receipt)

    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, context: Waiting
    ) -> pb.ScoreResponse:
        """Score every continuation in one prefill, token by token."""
        validate.check_continuations(request.continuations, self._parts.limits)

        async def read(target: Target) -> _Continuations:
            prompts = self._parts.prompts
            texts = tuple(request.continuations)
            return texts, await prompts.continuation_ids(texts, with_end=request.with_end)

        def tell(prepared: Prepared, finish: Finish) -> list[pb.ContinuationScore]:
            ids = prepared.request.labels
            return answers.continuation_scores(ids, finish.label_token_logprobs)

        scores, usage, receipt = await self._scored(request, context, read, tell)
        return pb.ScoreResponse(scores=scores, usage=usage, receipt=receipt)

    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, context: Waiting
    ) -> pb.EmbedResponse:
        """Turn every input into a vector; they share steps with one another and with all other calls."""
        arrived_s = time.monotonic()
        pooling = validate.read_pooling(request, self._parts.limits)
        with self._parts.calls.admitted(len(request.inputs)):
            self._check(request, context)
            kinds = []
            for place, message in enumerate(request.inputs):
                with _naming_input(place):
                    kinds.append(validate.check_input(message, self._parts.limits))
            if (span := current_span()) is not None:
                span.on_request(request, kinds[0])
            target, execution = await self._chosen(request, context)
            window = asyncio.Semaphore(EMBED_WINDOW)

            async def embed(place: int) -> pb.Embedding:
                async def prepare(target: Target) -> Prepared:
                    message, kind = request.inputs[place], kinds[place]
                    with _naming_input(place):
                        prototype = await self._prefill(message, kind, target, arrived_s, context)
                    prototype.pooling = pooling
                    prototype.priority = request.priority
                    return Prepared(request=prototype)

                def tell(_prepared: Prepared, finish: Finish) -> pb.Embedding:
                    receipt = answers.receipt(self._parts.facts, target, request_id(), finish)
                    return answers.embedding(finish, receipt)

                async with window:
                    told, _ = await self._read_once(target, prepare, execution, tell, arrived_s)
                return told

            embeddings = await together(map(embed, range(len(kinds))))
        return pb.EmbedResponse(embeddings=embeddings)

    async def _scored(
        self,
        request: pb.ClassifyRequest | pb.ScoreRequest,
        context: Waiting,
        read: Callable[[Target], Awaitable[_Continuations]],
        tell: Callable[[Prepared, Finish], Told],
    ) -> tuple[Told, pb.Usage, pb.Receipt]:
        """Run a call that scores texts behind its prompt: what ``read`` finds, as ``tell`` says it."""
        arrived_s = time.monotonic()
        with self._parts.calls.admitted():
            self._check(request, context)
            kind = self._check_input(request)
            target, execution = await self._chosen(request, context)

            async def prepare(target: Target) -> Prepared:
                texts, text_ids = await read(target)
                # All texts but their last tokens lie behind the prompt in the cache, side by side.
                room = max(1, sum(len(ids) - 1 for ids in text_ids))
                prototype = await self._prefill(
                    request.input, kind, target, arrived_s, context, room=room
                )
                prototype.labels = text_ids
                prototype.priority = request.priority
                return Prepared(request=prototype, labels=texts)

            told, finish = await self._read_once(target, prepare, execution, tell, arrived_s)
        receipt = answers.receipt(self._parts.facts, target, request_id(), finish)
        return told, answers.usage(finish), receipt

    async def _prefill(
        self,
        message: pb.Input,
        kind: str,
        target: Target,
        arrived_s: float,
        context: Waiting,
        *,
        room: int = 1,
    ) -> Request:
        """Return the request to read an input, and ``room`` tokens behind it, and to generate nothing."""
        prompt_ids = await self._prompt_ids(
            message, kind, target, room=room, toolset=_toolset(message)
        )
        prototype = self._request(prompt_ids, Sampling(max_tokens=1), arrived_s, context)
        prototype.active_from = await self._active_from(target, prompt_ids)
        return prototype

    async def _read_once(
        self,
        target: Target,
        prepare: Callable[[Target], Awaitable[Prepared]],
        execution: Execution,
        tell: Callable[[Prepared, Finish], Told],
        arrived_s: float,
    ) -> tuple[Told, Finish]:
        """Run a request that its prefill answers; return its answer, as ``tell`` says it, and its end."""
        with self._parts.rollout.observer.observed(target) as observation:
            prepared = await prepare(target)
            with (
                self._parts.rollout.shadows.copying(target, prepared, observation, prepare),
                self._running(target, prepared.request, 1, execution) as outputs,
            ):
                measured = self._parts.metrics.answer(target.name, arrived_s)
                (meter,) = watched([measured], prepared.request)
                output = await _next(outputs)
                meter.on_output(output)
                observation.see(output)
            if output.finish is None:
                raise LoraryError(
                    "the engine has begun to answer a request that generates nothing."
                )
            told = tell(prepared, output.finish)
        return told, output.finish

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Facts
    ) -> pb.TokenizeResponse:
        """Return the ids that Generate would read."""
        with self._parts.calls.admitted():
            kind = validate.check_input(request.input, self._parts.limits)
            toolset = _toolset(request.input)
            target = await self._target(request, context)
            ids = await self._parts.prompts.token_ids(request.input, kind, target, toolset)
            return pb.TokenizeResponse(token_ids=ids, pieces=await self._parts.prompts.pieces(ids))

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """Describe the base, its limits, and what is resident."""
        facts, metrics = self._parts.facts, self._parts.metrics
        return pb.GetServerInfoResponse(
            version=facts.version,
            base=facts.base,
            base_fingerprint=facts.base_fingerprint,
            quantization=facts.quantization,
            device=facts.device,
            dtype=facts.dtype,
            max_context=facts.max_context,
            max_batch=facts.max_batch,
            max_rank=facts.max_rank,
            adapter_memory_bytes=facts.adapter_memory_bytes,
            adapter_memory_used_bytes=sum(
                resident.device_bytes for resident in self._parts.residency.snapshot()
            ),
            steps_by_distinct_adapters=metrics.steps_by_distinct_adapters,
            num_running=self._parts.engine.num_running,
            num_waiting=self._parts.engine.num_waiting,
        )

    def _check(self, request: AdapterCall, context: Waiting) -> None:
        """Check what all calls have, as far as that needs no registry."""
        validate.check_routing_key(request.routing_key)
        validate.check_request_id(request.request_id)
        if request.request_id:
            set_request_id(context, request.request_id)
        validate.check_priority(request.priority)

    def _check_input(self, request: OneInput) -> str:
        """Check the only input of a call; return its kind."""
        kind = validate.check_input(request.input, self._parts.limits)
        span = current_span()
        if span is not None:
            span.on_request(request, kind)
        return kind

    async def _chosen(self, request: AdapterCall, context: Waiting) -> tuple[Target, Execution]:
        """Return what answers a call, and how it takes part.

        Raises:
            LoraryError: the ref means nothing, or what it means cannot take part so.
        """
        execution = validate.check_execution(request.execution)
        key = request.routing_key or request_id()
        target = await self._target(request, context, key)
        self._check_mergeable(execution, target)
        return target, execution

    def _check_mergeable(self, execution: Execution, target: Target) -> None:
        """Refuse what can never run on merged weights here.

        Raises:
            InvalidRequest: ``merged`` with several adapters, a scale, or none.
            NotMergeable: an aLoRA, or this server merges nothing.
        """
        if execution != "merged":
            return
        if target.resolved is None:
            what = f"'{target.ref}' is a composition" if target.digest else "no adapter is named"
            raise InvalidRequest(
                f"execution is MERGED and {what}; one adapter with weight 1 can be folded into the base. Use "
                "AUTO or BATCHED.",
                field="execution",
            )
        if target.is_activated:
            raise NotMergeable(
                f"execution is MERGED and '{target.ref}' is an aLoRA: the base up to its invocation and the adapter "
                "behind it, which no weights are. Use AUTO or BATCHED."
            )
        if self._parts.merging is None:
            raise NotMergeable(
                f"execution is MERGED and this server merges nothing, so '{target.ref}' can only be batched. "
                "Use AUTO or BATCHED, or start the server with --merge-memory."
            )

    async def _target(self, request: HasAdapters, context: Facts, key: str | None = None) -> Target:
        named = read_adapters(request)
        span, call = current_span(), current_call()
        if span is not None:
            span.on_refs(named)
        target = await resolve_adapters(
            self._parts.targets,
            named,
            self._parts.residency,
            max_rank=self._parts.facts.max_rank,
            key=key,
        )
        if span is not None:
            span.on_target(target)
        if call is not None:
            call.digest = target.digest
        if target.digest:
            add_trailing(context, ADAPTER_KEY, target.name)
            add_trailing(context, VERSION_KEY, str(target.version))
        add_trailing(context, DIGEST_KEY, target.digest)
        return target

    async def _prompt_ids(
        self,
        message: pb.Input,
        kind: str,
        target: Target,
        *,
        room: int = 1,
        toolset: Toolset | None = None,
    ) -> Sequence[int]:
        ids = await self._parts.prompts.token_ids(message, kind, target, toolset)
        validate.check_length(ids, self._parts.limits, room=room)
        return ids

    async def _active_from(self, target: Target, prompt_ids: Sequence[int]) -> int:
        """Return the first position that the adapter computes.

        Raises:
            InvalidRequest: it is an aLoRA and the prompt lacks its invocation. PEFT would leave the adapter
                off then; here nobody is answered by the bare base who has named an adapter.
        """
        start = active_from(prompt_ids, target.invocation)
        if start is None:
            text = await self._parts.prompts.text(target.invocation)
            raise InvalidRequest(
                f"the prompt lacks the invocation {text[:200]!r} (tokens {list(target.invocation[:32])}) of "
                f"'{target.name}@{target.version}', an aLoRA that is on from there and would never be. Put it "
                "where the adapter is to begin, such as at the prompt's end.",
                field="input",
            )
        return start

    def _request(
        self, prompt_ids: Sequence[int], sampling: Sampling, arrived_s: float, context: Waiting
    ) -> Request:
        """Return the request that all answers of a call are copies of.

        Callers may reuse their ids, and two callers may choose the same one; the engine's key is
        the caller's id made unique.
        """
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineExceeded("the deadline passed before the work began; allow more time.")
        return Request(
            request_id=f"{request_id()}/{secrets.token_hex(4)}",
            prompt_ids=prompt_ids,
            sampling=sampling,
            lease=BaseLease(),
            arrived_s=arrived_s,
            deadline_s=None if remaining_s is None else time.monotonic() + remaining_s,
            salt=tenant_name(),
        )

    async def _compiled(self, constraint: Constraint, toolset: Toolset | None) -> Grammar:
        """Return the grammar of a constraint, made of the schemas of ``toolset`` where there is one.

        Raises:
            InvalidRequest: it cannot be compiled; for tools, naming the first whose schema cannot.
        """
        submit = self._parts.grammars.submit
        try:
            return cast("Grammar", await asyncio.wrap_future(submit(constraint)))
        except InvalidRequest as error:
            if toolset is None:
                raise
            for i, tool in toolset.callable:
                schema = json.dumps(closed_schema(tool.parameters))
                try:
                    await asyncio.wrap_future(submit(Constraint("json_schema", schema)))
                except InvalidRequest as cause:
                    raise InvalidRequest(
                        f"the parameters of tool '{tool.name}' cannot be used: {cause}",
                        field=f"input.chat.tools[{i}].parameters",
                    ) from cause
            raise InvalidRequest(
                f"the tools cannot be used together: {error}", field="input.chat.tools"
            ) from error

    @contextmanager
    def _running(
        self, target: Target, prototype: Request, num_answers: int, execution: Execution
    ) -> Iterator[Mailbox[Output]]:
        """Run a call's answers on the engine, and cancel them if the call ends early.

        Every answer has a lease of its own, so that the first to end does not take the adapter
        from the others.
        """
        engine = self._parts.engine
        with self._parts.calls.listening(prototype.request_id, target.digests) as outputs:
            try:
                prototype.account = target.lead
                for index in range(num_answers):
                    lease = self._lease(target, execution)
                    can_merge = isinstance(lease, MergeLease)
                    self._submit(
                        replace(
                            prototype,
                            lease=lease,
                            index=index,
                            execution=execution if can_merge else "batched",
                        )
                    )
                yield outputs
            except BaseException:
                engine.cancel(prototype.request_id)
                raise

    def _submit(self, request: Request) -> None:
        try:
            self._parts.engine.submit(request)
        except BaseException:
            request.lease.release()
            raise

    def _lease(self, target: Target, execution: Execution) -> Lease:
        if not target.digest:
            return BaseLease()
        if target.resolved is not None:
            return hold_version(
                self._parts.residency, self._parts.merging, target.resolved, execution
            )
        resolved = {part.digest: part.resolved for part in target.parts}
        return self._parts.compositions.acquire(target.digest, resolved, summed(target.parts))

    async def _stream(
        self,
        outputs: Mailbox[Output],
        target: Target,
        prototype: Request,
        readers: Sequence[CallReader | None],
        observation: Observation,
        context: Context,
    ) -> None:
        """Write events until every answer has ended; there is a reader, or None, for each."""
        metrics = self._parts.metrics
        meters = watched(
            [metrics.answer(target.name, prototype.arrived_s) for _ in readers], prototype
        )
        num_open = len(readers)
        writer = Writer(context, self._parts.stall_s)
        with writer.watched():
            while num_open:
                for output in await self._arrived(outputs):
                    if output.error is not None:
                        raise output.error
                    meters[output.index].on_output(output)
                    observation.see(output)
                    reader = readers[output.index]
                    if output.token_ids or output.text:
                        is_last = output.finish is not None
                        piece = reader.push(output.text, is_last=is_last) if reader else None
                        await writer.write(answers.chunk(output, piece))
                    if output.finish is not None:
                        num_open -= 1
                        receipt = answers.receipt(
                            self._parts.facts, target, request_id(), output.finish
                        )
                        await writer.write(answers.complete(output, output.finish, receipt, reader))

    async def _arrived(self, outputs: Mailbox[Output]) -> list[Output]:
        """Return what is to leave now: several steps' where these are joined, or the caller reads too slowly."""
        if self._parts.calls.joins_steps:
            return joined(await outputs.get_all())
        return [await outputs.get()]


def _toolset(message: pb.Input, params: pb.SamplingParams | None = None) -> Toolset | None:
    """Return the tools that an input's answers may call, if any."""
    toolset = read_toolset(message.chat) if message.WhichOneof("input") == "chat" else None
    if toolset is not None and params is not None:
        check_options(toolset, params)
    return toolset


@contextmanager
def _naming_input(place: int) -> Iterator[None]:
    """Let errors about a call's only input be about the one at ``place`` among several."""
    try:
        yield
    except InvalidRequest as error:
        head, dot, rest = error.field.partition(".")
        if head != "input":
            raise
        field, text = f"inputs[{place}]{dot}{rest}", str(error)
        if text.startswith(f"{error.field} "):
            text = field + text.removeprefix(error.field)
        raise InvalidRequest(text, field=field) from error


async def _next(outputs: Mailbox[Output]) -> Output:
    output = await outputs.get()
    if output.error is not None:
        raise output.error
    return output
