"""The loop that owns the device.

A request's life: ``submit`` (any thread) → inbox → scheduler's queue → a slot and blocks of the cache,
once its adapter is on the device → prompt in chunks → one token per step → ``Finish``, all of it given
back. Where blocks run out, the latest to arrive is preempted: back to the queue's front, its tokens kept,
to be read again (from the tree of blocks, as far as they are still there). One call of ``deliver`` per
pass hands all outputs to the service.

A step is one pass of the model, or two where some of its rows run on merged weights (``adapters.merging``);
before it goes one through the upper layers alone where prompts begin behind the shared ones (``blocks``).

Everything below ``_run`` happens on the engine thread; ``submit``, ``cancel``, ``wake`` and the
properties may be used from any other.
"""

from __future__ import annotations

import logging
import threading
import time
from random import Random
from typing import TYPE_CHECKING, Protocol, cast

import torch

from lorary.errors import (
    Cancelled,
    EngineFailed,
    InvalidRequest,
    LoraryError,
    Unavailable,
)
from lorary.server.engine.answering import Answers
from lorary.server.engine.batch import Batch, build_batch
from lorary.server.engine.blocks import BLOCK
from lorary.server.engine.detokenizer import Detokenizer
from lorary.server.engine.places import Places
from lorary.server.engine.pooling import Pool
from lorary.server.engine.request import Finish, Output, Request, StepStats
from lorary.server.engine.sequence import Sequence
from lorary.server.engine.speculation import Drafter
from lorary.server.maths_threads import let_helpers_go

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedTokenizerBase

    from lorary.server.adapters.merging import Merging
    from lorary.server.engine.kv_cache import KVCache
    from lorary.server.engine.request import MergeableLease
    from lorary.server.engine.runner import Runner
    from lorary.server.engine.scheduler import Scheduled, Scheduler

logger = logging.getLogger(__name__)


class EngineObserver(Protocol):
    """Who is told what the engine does; called on the engine thread, must not block."""

    def on_step(self, stats: StepStats) -> None:
        """One step is done."""
        ...

    def on_error(self, error: BaseException) -> None:
        """A step raised: every request has failed and the engine has stopped."""
        ...


class Engine:
    """Continuous batching over one resident base with a different adapter in every row."""

    def __init__(
        self,
        *,
        runner: Runner,
        cache: KVCache,
        scheduler: Scheduler,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: frozenset[int],
        long_from: int,
        deliver: Callable[[list[Output]], None],
        prefix_cache: bool = True,
        draft_rows: int = 0,
        merging: Merging | None = None,
        observer: EngineObserver | None = None,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_thread_start = on_thread_start
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._detokenizer = Detokenizer(tokenizer.backend_tokenizer)
        self._long_from = long_from
        self._places = Places(cache, scheduler, share=prefix_cache)
        self._answers = Answers(tokenizer, eos_ids, cache.shape.context, self._end)
        self._merging = merging
        # The last pass on the base's weights, and on merged ones.
        self._last: dict[bool, Batch] = {}
        self._draft_rows = draft_rows
        self._deliver = deliver
        self._observer = observer
        self._device = cache.k.device
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._cancelled: set[str] = set()
        self._stopping: LoraryError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- any thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread; called by the thread that has built the engine."""
        let_helpers_go()
        self._thread.start()

    def submit(self, request: Request, *, is_own: bool = False) -> None:
        """Queue a request; outputs come through ``deliver``. The engine releases its lease.

        The server's own (``is_own``) finds room in a full queue: callers there may wait for it.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the engine is stopping or has failed.
            InvalidRequest: it does not fit into the context, or has a token that the model does not
                know. In all cases nothing was queued and the lease is still the caller's.
        """
        self._check_fits(request)
        with self._changed:
            if self._stopping is not None:
                raise Unavailable(str(self._stopping))
            if not is_own:
                self._scheduler.check_room(1, len(self._inbox))
            self._inbox.append(request)
            self._changed.notify()

    def _check_fits(self, request: Request) -> None:
        """Refuse what is longer than any sequence may be, and what the model has no embedding for."""
        prompt = len(request.prompt_ids)
        beyond = sum(len(label) - 1 for label in request.labels) if request.labels else 1
        if not prompt or prompt + beyond > self._cache.shape.context:
            raise InvalidRequest(
                f"a prompt of {prompt} tokens with {beyond} behind it does not fit into a context of "
                f"{self._cache.shape.context}; shorten it, or raise --max-context",
                field="input",
            )
        # The service checks what callers send as ids; these are the tokenizer's own, too. The native
        # embeddings are read without another look.
        largest = max(map(max, (request.prompt_ids, *request.labels)))
        if largest >= self._runner.vocab_size:
            raise InvalidRequest(
                f"token id {largest} is not in the base's vocabulary of {self._runner.vocab_size}; its "
                "tokenizer has tokens that the model does not know",
                field="input",
            )

    def cancel(self, request_id: str) -> None:
        """Drop every answer of a request at the next step; unknown ids are ignored."""
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify()

    def wake(self) -> None:
        """Look again at what waits: an adapter's load has ended."""
        with self._changed:
            self._changed.notify()

    def shutdown(self, timeout_s: float = 10.0) -> None:
        """Stop after the current step; what is in flight ends with ``Unavailable``. Idempotent."""
        with self._changed:
            if self._stopping is None:
                self._stopping = Unavailable("the server is shutting down; try another replica")
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs and takes requests."""
        return self._thread.is_alive() and self._stopping is None

    @property
    def num_running(self) -> int:
        """Requests that have a place."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place or for their adapter."""
        return len(self._scheduler.waiting) + len(self._inbox)

    # -- engine thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._on_thread_start()
            # All of it, for logits made in inference mode may be changed in place (penalties) only in it.
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step()
        except Exception as error:
            # The one place for what nobody foresaw: better no engine than a wrong one.
            logger.exception("the engine failed")
            with self._changed:
                self._stopping = EngineFailed("the engine failed; the server is going down")
            self._fail_everyone(self._stopping)
            if self._observer is not None:
                self._observer.on_error(error)
            return
        assert self._stopping is not None
        self._fail_everyone(self._stopping)

    def _wait_for_work(self) -> bool:
        """Take in what came; sleep while nothing can run. False: stop."""
        scheduler = self._scheduler
        while True:
            with self._changed:
                if self._stopping is not None:
                    return False
                inbox, self._inbox = self._inbox, []
                cancelled, self._cancelled = self._cancelled, set()
            for request in inbox:
                scheduler.add(self._sequence(request))
            self._drop(cancelled)
            if scheduler.running or scheduler.waiting.has_ready:
                return True
            with self._changed:
                if not (self._inbox or self._cancelled or self._stopping):
                    # A lease may have become ready since it was looked at, without a wake-up that
                    # this thread could hear; the time-out bounds what that can cost.
                    self._changed.wait(0.02 if scheduler.waiting else None)

    def _sequence(self, request: Request) -> Sequence:
        now = time.monotonic_ns()
        sequence = Sequence(
            request=request,
            token_ids=list(request.prompt_ids),
            arrived_ns=int(request.arrived_s * 1e9) or now,
        )
        if request.pooling is not None:
            sequence.pool = Pool(request.pooling)
        if request.is_text:
            sequence.text = self._detokenizer.stream(
                request.sampling.stop, request.sampling.shown_ids
            )
            sequence.drafter = Drafter() if self._draft_rows else None
            if request.grammar is not None:
                sequence.matcher = request.grammar.matcher()
            if not request.sampling.is_greedy:
                seed = request.sampling.seed
                # Answers of one call differ; the same index of the same seed does not.
                sequence.generator = Random(
                    None if seed is None else seed * 1000003 + request.index
                )
        return sequence

    def _drop(self, cancelled: set[str]) -> None:
        """End what was cancelled, what is or will be too late, and what waits for a failed load."""
        late = self._scheduler.late()
        if not (cancelled or late or self._scheduler.waiting):
            return
        outputs: list[Output] = []
        for sequence in self._scheduler.everyone():
            request = sequence.request
            error: LoraryError | None = None
            if request.request_id in cancelled:
                error = Cancelled(f"request '{request.request_id}' was cancelled")
            elif sequence in late:
                error = late[sequence]
            elif sequence.slot < 0:
                error = request.lease.error
            if error is not None:
                outputs.append(self._end(sequence, error=error))
        if outputs:
            self._deliver(outputs)

    def _step(self) -> None:
        """Do one step's work, in inference mode."""
        started = time.perf_counter()
        if self._merging is not None and self._merging.is_revoked:
            self._leave_merged(self._merging)
        self._places.make_room()
        scheduled: Scheduled = self._scheduler.next_batch(self._places.admit)
        if scheduled.is_empty:
            return
        drafts = self._drafts(scheduled)
        since = started
        for part in self._parts(scheduled):
            if not self._pass(part, drafts, since):
                return
            since = time.perf_counter()
        self._scheduler.note_step(since - started)

    def _parts(self, scheduled: Scheduled) -> Iterable[Scheduled]:
        """Return a step's work in parts, each for one pass of the model, in the order of the passes."""
        parts = scheduled.by_start() if self._cache.shape.shared_layers else (scheduled,)
        if self._merging is None:
            return parts
        return [weighted for part in parts for weighted in part.by_weights()]

    def _pass(
        self, scheduled: Scheduled, drafts: dict[Sequence, list[int]], started: float
    ) -> bool:
        """Run the model once, for one part of a step; False when there was no memory for it."""
        is_merged = scheduled.merged is not None
        if drafts:
            drafts = {s: drafts[s] for s in scheduled.decode if s in drafts}
        try:
            batch = build_batch(
                scheduled,
                self._cache,
                device=self._device,
                long_from=self._long_from,
                drafts=drafts,
                # Not kept: unless it is advanced, its tensors make room for the next one's.
                last=self._last.pop(is_merged, None),
            )
            found = self._runner.forward(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self._last.clear()
            self._do_with_less(scheduled, drafts, error)
            return False
        self._last[is_merged] = batch
        self._places.move_on(batch.advanced)
        if self._merging is not None:
            self._merging.note([s.request.lease for s in batch.samplers])
        try:
            outputs, num_kept = self._answers.of_step(batch, found)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self._last.clear()
            self._give_up(batch, error)
            return False
        self._places.note_success()
        for sequence, _ in batch.drafted:
            # Unless it has ended.
            if sequence.slot >= 0:
                self._places.blocks.publish(sequence)
        self._record(batch, time.perf_counter() - started, num_kept)
        if outputs:
            self._deliver(outputs)
        return True

    def _do_with_less(
        self, scheduled: Scheduled, drafts: dict[Sequence, list[int]], error: BaseException
    ) -> None:
        """Give something up after a pass for which there was no memory: a copy, guesses, places, at last an answer.

        Raises:
            BaseException: ``error``, where not even the least of steps has memory.
        """
        if self._merging is not None and self._merging.revoke("memory"):
            self._leave_merged(self._merging)
            return
        if drafts:
            for sequence in drafts:
                sequence.drafter = None
            return
        refused = self._places.shrink(scheduled, error)
        if refused is not None:
            sequence, reason = refused
            self._deliver([self._end(sequence, error=reason)])

    def _give_up(self, batch: Batch, error: BaseException) -> None:
        """End all that would have got something from a step for whose tokens there was no memory.

        Some may have a token more, or be at their end, that nobody was told of: none could go on as if the
        step had not been. Who was only reading its prompt goes on.

        Raises:
            BaseException: ``error``, where there has been no memory for this time and again.
        """
        num_rows = batch.logits_rows.numel() + batch.hidden_rows.numel()
        reason = self._places.narrow(batch.readers, num_rows, error)
        self._deliver(
            [
                self._end(sequence, error=reason)
                if sequence.slot >= 0
                else Output(sequence.request.request_id, sequence.request.index, error=reason)
                for sequence in batch.readers
            ]
        )

    def _leave_merged(self, merging: Merging) -> None:
        """Let merged weights be freed now: who runs on them loses its place, and goes on beside the base's."""
        for sequence in self._scheduler.everyone():
            if sequence.merged is None:
                continue
            # First: what it has read stays with the weights that it was read on.
            if sequence.slot >= 0:
                self._places.preempt(sequence)
            sequence.merged, sequence.request.is_on_merged = None, False
            cast("MergeableLease", sequence.request.lease).give_up()
        self._last.pop(True, None)
        merging.free_revoked()

    def _drafts(self, scheduled: Scheduled) -> dict[Sequence, list[int]]:
        """Guess next tokens where a step has rows to spare; steps that read prompts have none."""
        spare = self._draft_rows - len(scheduled.decode)
        drafts: dict[Sequence, list[int]] = {}
        if scheduled.prefill:
            return drafts
        for sequence in scheduled.decode:
            if spare <= 0:
                break
            if sequence.drafter is None:
                continue
            room = self._cache.shape.context - len(sequence.token_ids)
            left = sequence.request.sampling.max_tokens - sequence.num_generated - 1
            most = min(spare, room, left)
            draft = sequence.drafter.draft(sequence.token_ids, most)
            if sequence.matcher is not None and most > 0:
                draft = sequence.matcher.draft(draft, most)
            # A guess is not worth somebody's place in the next step.
            is_room = self._places.blocks.num_free > len(scheduled.decode)
            if (
                draft
                and is_room
                and self._places.grow(sequence, len(sequence.token_ids) + len(draft))
            ):
                drafts[sequence] = draft
                spare -= len(draft)
        return drafts

    def _end(
        self,
        sequence: Sequence,
        *,
        finish: Finish | None = None,
        error: LoraryError | None = None,
    ) -> Output:
        """Give back everything a sequence holds; the only way out of the scheduler."""
        self._scheduler.remove(sequence)
        if sequence.slot >= 0:
            self._places.release(sequence)
        # Steps to come are told from the last one, which must not keep merged weights alive.
        sequence.merged = None
        sequence.request.lease.release()
        request = sequence.request
        return Output(
            request_id=request.request_id, index=request.index, finish=finish, error=error
        )

    def _record(self, batch: Batch, seconds: float, num_kept: int) -> None:
        if self._observer is None:
            return
        scheduler = self._scheduler
        self._observer.on_step(
            StepStats(
                seconds=seconds,
                num_decode_rows=batch.num_decode,
                num_prefill_tokens=batch.num_prefill_tokens,
                num_drafted_tokens=batch.num_drafted_tokens,
                num_kept_tokens=num_kept,
                num_distinct_adapters=batch.num_distinct_adapters,
                num_merged_rows=len(batch.samplers) + num_kept if batch.merged else 0,
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                num_waiting_for_adapter=scheduler.num_waiting_for_adapter,
                num_preempted=self._places.num_preempted,
                kv_tokens_used=(self._cache.num_blocks - self._places.blocks.num_free) * BLOCK,
                kv_tokens_total=self._cache.num_blocks * BLOCK,
            )
        )
        self._places.num_preempted = 0

    def _fail_everyone(self, error: LoraryError) -> None:
        with self._changed:
            inbox, self._inbox = self._inbox, []
        outputs = [self._end(s, error=error) for s in self._scheduler.everyone()]
        for request in inbox:
            request.lease.release()
            outputs.append(Output(request_id=request.request_id, index=request.index, error=error))
        if outputs:
            self._deliver(outputs)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's or the system's; torch's CPU allocator says it in words only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)
