"""The loop that owns the device.

A request's life: ``submit`` (any thread) → inbox → scheduler's queue → a slot, once its adapter is
on the device → prompt in chunks → one token per step → ``Finish``, slot and lease given back. One
call of ``deliver`` per step hands all outputs to the service.

Everything below ``_run`` happens on the engine thread; ``submit``, ``cancel``, ``wake`` and the
properties may be used from any other.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol, cast

import torch

from lorary.errors import (
    Cancelled,
    EngineFailed,
    InvalidRequest,
    LoraryError,
    Unavailable,
)
from lorary.server.engine.batch import Batch, build_batch
from lorary.server.engine.detokenizer import TextStream
from lorary.server.engine.request import Finish, Lease, Output, Request, StepStats
from lorary.server.engine.sampler import position_logprobs, sample, score_labels
from lorary.server.engine.sequence import Sequence
from lorary.server.engine.speculation import Drafter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

    from lorary.server.adapters.segments import PoolEntry
    from lorary.server.engine.kv_cache import KVCache
    from lorary.server.engine.prefix_cache import PrefixCache
    from lorary.server.engine.request import FinishReason
    from lorary.server.engine.runner import Runner
    from lorary.server.engine.scheduler import Scheduled, Scheduler

logger = logging.getLogger(__name__)


class DeviceLease(Lease, Protocol):
    """What the engine needs of a lease beyond what the service sees."""

    @property
    def entry(self) -> PoolEntry | None:
        """The adapter's place in the pool once ready; None for the bare base."""
        ...

    @property
    def load_ns(self) -> int:
        """Nanoseconds from ``acquire`` until it was ready; 0 when it was resident."""
        ...


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
        prefix_cache: PrefixCache | None = None,
        draft_rows: int = 0,
        observer: EngineObserver | None = None,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_thread_start = on_thread_start
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._eos_ids = eos_ids
        self._long_from = long_from
        self._prefix_cache = prefix_cache
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
        """Start the engine thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; outputs come through ``deliver``. The engine releases its lease.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the engine is stopping or has failed.
            InvalidRequest: it does not fit into a slot. In all cases nothing was queued and the
                lease is still the caller's.
        """
        self._check_fits(request)
        with self._changed:
            if self._stopping is not None:
                raise Unavailable(str(self._stopping))
            self._scheduler.check_room(1, len(self._inbox))
            self._inbox.append(request)
            self._changed.notify()

    def _check_fits(self, request: Request) -> None:
        """Refuse what would be written beyond its own slot, into another sequence's."""
        prompt = len(request.prompt_ids)
        beyond = sum(len(label) - 1 for label in request.labels) if request.labels else 1
        if not prompt or prompt + beyond > self._cache.shape.context:
            raise InvalidRequest(
                f"a prompt of {prompt} tokens with {beyond} behind it does not fit into a slot of "
                f"{self._cache.shape.context}; shorten it, or raise --max-context",
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
        if not request.labels:
            sequence.text = TextStream(self._backend, request.sampling.stop)
            sequence.drafter = Drafter() if self._draft_rows else None
            if not request.sampling.is_greedy:
                sequence.generator = torch.Generator()
                if request.sampling.seed is None:
                    sequence.generator.seed()
                else:
                    # Answers of one call differ; the same index of the same seed does not.
                    seed = request.sampling.seed * 1000003 + request.index
                    sequence.generator.manual_seed(seed % 2**63)
        return sequence

    def _drop(self, cancelled: set[str]) -> None:
        """End what was cancelled, what is or will be too late, and what waits for a failed load."""
        late = self._scheduler.late()
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
            self._compact()
            self._deliver(outputs)

    # All of it, for logits made in inference mode may be changed in place (penalties) only in it.
    @torch.inference_mode()
    def _step(self) -> None:
        started = time.perf_counter()
        scheduled: Scheduled = self._scheduler.next_batch(self._admit)
        if scheduled.is_empty:
            return
        batch = build_batch(
            scheduled,
            self._cache,
            device=self._device,
            long_from=self._long_from,
            drafts=self._drafts(scheduled),
        )
        logits = self._runner.forward(batch)
        for sequence, count in batch.advanced:
            sequence.num_computed += count
        outputs = self._sample(batch, logits)
        kept = [self._keep_drafted(*part) for part in self._drafted_logits(batch, logits)]
        outputs += [output for output, _ in kept] + self._score(batch, logits)
        self._compact()
        num_kept = sum(count for _, count in kept)
        seconds = time.perf_counter() - started
        self._scheduler.note_step(seconds)
        self._record(batch, seconds, num_kept)
        if outputs:
            self._deliver(outputs)

    def _drafts(self, scheduled: Scheduled) -> dict[Sequence, list[int]]:
        """Guess next tokens where a step has rows to spare; steps that read prompts have none."""
        spare = self._draft_rows - len(scheduled.decode)
        drafts: dict[Sequence, list[int]] = {}
        if scheduled.prefill:
            return drafts
        for sequence in scheduled.decode:
            if spare <= 0 or sequence.drafter is None:
                continue
            room = self._cache.shape.context - len(sequence.token_ids)
            left = sequence.request.sampling.max_tokens - sequence.num_generated - 1
            draft = sequence.drafter.draft(sequence.token_ids, min(spare, room, left))
            if draft:
                drafts[sequence] = draft
                spare -= len(draft)
        return drafts

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence its slot; False when it should wait for a prompt that begins like its own."""
        lease = cast("DeviceLease", sequence.request.lease)
        if self._prefix_cache is None:
            sequence.slot = self._cache.allocate()
        else:
            free = self._cache.free_slots
            claim = self._prefix_cache.claim(sequence, self._scheduler.running, free)
            if claim is None:
                return False
            sequence.slot = self._cache.take(claim.slot)
            if claim.source != claim.slot:
                self._cache.move(claim.source, claim.slot, claim.length)
            sequence.num_cached = sequence.num_computed = claim.length
        sequence.entry = lease.entry
        sequence.started_ns = time.monotonic_ns()
        return True

    def _sample(self, batch: Batch, logits: torch.Tensor) -> list[Output]:
        return self._choose(batch.samplers, logits[: len(batch.samplers)])

    def _choose(self, sequences: tuple[Sequence, ...], rows: torch.Tensor) -> list[Output]:
        """Give every sequence its next token, from its row of logits."""
        if not sequences:
            return []
        # Reported log probabilities are those before penalties, which change rows in place.
        wanted = {
            i: rows[i].clone()
            for i, s in enumerate(sequences)
            if s.request.sampling.logprobs is not None
        }
        tokens = sample(rows, sequences, self._eos_ids)
        outputs = []
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            output = self._append(sequence, token)
            if i in wanted:
                top = sequence.request.sampling.logprobs or 0
                output.logprobs.append(position_logprobs(wanted[i], token, top))
            outputs.append(output)
        return outputs

    def _drafted_logits(
        self, batch: Batch, logits: torch.Tensor
    ) -> Iterator[tuple[Sequence, list[int], torch.Tensor]]:
        """Yield every drafted sequence with its draft and its rows of logits."""
        row = len(batch.samplers)
        for sequence, draft in batch.drafted:
            yield sequence, draft, logits[row : row + 1 + len(draft)]
            row += 1 + len(draft)

    def _keep_drafted(
        self, sequence: Sequence, draft: list[int], rows: torch.Tensor
    ) -> tuple[Output, int]:
        """Choose token by token, as without a draft, for as long as it had guessed right.

        Returns:
            What the step made of the sequence, and how many drafted tokens were right.
        """
        request = sequence.request
        whole = Output(request_id=request.request_id, index=request.index)
        num_right = 0
        for i in range(len(rows)):
            (output,) = self._choose((sequence,), rows[i : i + 1])
            # The row's own token is in the cache, and right.
            sequence.num_computed += 1
            whole.text += output.text
            whole.token_ids += output.token_ids
            whole.logprobs += output.logprobs
            whole.finish = output.finish
            is_right = i < len(draft) and output.token_ids == [draft[i]]
            num_right += is_right
            if whole.finish is not None or not is_right:
                break
        assert sequence.drafter is not None
        sequence.drafter.learn(len(draft), num_right, len(sequence.token_ids))
        return whole, num_right

    def _append(self, sequence: Sequence, token: int) -> Output:
        """Add a token to its answer, and end the answer if that ends it."""
        request = sequence.request
        sampling = request.sampling
        assert sequence.text is not None
        if sequence.num_generated == 0:
            sequence.first_token_ns = time.monotonic_ns()
        sequence.token_ids.append(token)
        if sampling.has_penalties:
            sequence.counts[token] = sequence.counts.get(token, 0) + 1
        output = Output(request_id=request.request_id, index=request.index, token_ids=[token])
        is_end = token in sampling.stop_token_ids or (
            token in self._eos_ids and not sampling.ignore_eos
        )
        reason: FinishReason | None = None
        matched = ""
        if is_end:
            reason, matched = "stop", self._tokenizer.convert_ids_to_tokens(token)
        else:
            output.text = sequence.text.push(token)
            if sequence.text.matched_stop:
                if sequence.num_generated >= sampling.min_tokens:
                    reason, matched = "stop", sequence.text.matched_stop
            elif (
                sequence.num_generated >= sampling.max_tokens
                or len(sequence.token_ids) >= self._cache.shape.context
            ):
                reason = "length"
        if reason is not None:
            output.text += sequence.text.finish()
            finish = self._finish(sequence, reason, matched)
            ended = self._end(sequence, finish=finish)
            output.finish = ended.finish
        return output

    def _score(self, batch: Batch, logits: torch.Tensor) -> list[Output]:
        row = batch.first_score_row
        outputs = []
        for sequence in batch.scorers:
            count = 1 + sequence.num_branch_tokens
            scores = score_labels(logits[row : row + count], sequence.request.labels)
            row += count
            sequence.first_token_ns = time.monotonic_ns()
            finish = self._finish(sequence, "scored", "", scores)
            outputs.append(self._end(sequence, finish=finish))
        return outputs

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        matched: str,
        scores: tuple[float, ...] = (),
    ) -> Finish:
        now = time.monotonic_ns()
        lease = cast("DeviceLease", sequence.request.lease)
        return Finish(
            reason=reason,
            text=sequence.text.text if sequence.text is not None else "",
            matched_stop=matched,
            prompt_tokens=sequence.num_prompt,
            completion_tokens=sequence.num_generated,
            cached_tokens=sequence.num_cached,
            queue_ns=max(0, sequence.started_ns - sequence.arrived_ns),
            adapter_load_ns=lease.load_ns,
            prefill_ns=sequence.first_token_ns - sequence.started_ns,
            decode_ns=now - sequence.first_token_ns,
            label_logprobs=scores,
        )

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
            self._cache.release(sequence.slot)
            if self._prefix_cache is not None:
                computed = sequence.token_ids[: sequence.num_computed]
                self._prefix_cache.keep(sequence.slot, sequence.request.lease.digest, computed)
            sequence.slot = -1
        sequence.request.lease.release()
        request = sequence.request
        return Output(
            request_id=request.request_id, index=request.index, finish=finish, error=error
        )

    def _compact(self) -> None:
        """Move sequences from high slots into holes, so that decoding reads a dense front.

        The native kernels read any slots alike.
        """
        if self._cache.native is not None:
            return
        running = self._scheduler.running
        count = len(running)
        holes = sorted(set(range(count)) - {s.slot for s in running}, reverse=True)
        for sequence in running:
            if sequence.slot >= count:
                target = holes.pop()
                taken = self._cache.take(target)
                self._cache.move(sequence.slot, taken, sequence.num_computed)
                self._cache.release(sequence.slot)
                sequence.slot = taken

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
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                num_waiting_for_adapter=scheduler.num_waiting_for_adapter,
                kv_tokens_used=sum(s.num_computed for s in scheduler.running),
                kv_tokens_total=self._cache.num_slots * self._cache.shape.context,
            )
        )

    def _fail_everyone(self, error: LoraryError) -> None:
        with self._changed:
            inbox, self._inbox = self._inbox, []
        outputs = [self._end(s, error=error) for s in self._scheduler.everyone()]
        for request in inbox:
            request.lease.release()
            outputs.append(Output(request_id=request.request_id, index=request.index, error=error))
        if outputs:
            self._deliver(outputs)
