"""The loop that owns the device.

A request's life: ``submit`` (any thread) → inbox → scheduler's queue → a slot and blocks of the cache,
once its adapter is on the device → prompt in chunks → one token per step → ``Finish``, all of it given
back. Where blocks run out, the latest to arrive is preempted: back to the queue's front, its tokens kept,
to be read again (from the tree of blocks, as far as they are still there). One call of ``deliver`` per
step hands all outputs to the service.

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
from lorary.server.engine.batch import Batch, build_batch
from lorary.server.engine.blocks import BLOCK, Blocks
from lorary.server.engine.detokenizer import Detokenizer
from lorary.server.engine.request import Finish, Lease, Output, PositionLogprobs, Request, StepStats
from lorary.server.engine.sampler import (
    position_logprobs,
    prompt_logprobs,
    sample,
    score_labels,
)
from lorary.server.engine.sequence import Sequence
from lorary.server.engine.speculation import Drafter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

    from lorary.server.adapters.segments import PoolEntry
    from lorary.server.engine.kv_cache import KVCache
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
        prefix_cache: bool = True,
        draft_rows: int = 0,
        observer: EngineObserver | None = None,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_thread_start = on_thread_start
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.backend_tokenizer)
        self._eos_ids = eos_ids
        self._long_from = long_from
        self._blocks = Blocks(cache.num_blocks, share=prefix_cache)
        self._is_full = False
        self._num_preempted = 0
        self._last: Batch | None = None
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
            sequence.text = self._detokenizer.stream(request.sampling.stop)
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

    # All of it, for logits made in inference mode may be changed in place (penalties) only in it.
    @torch.inference_mode()
    def _step(self) -> None:
        started = time.perf_counter()
        self._make_room()
        scheduled: Scheduled = self._scheduler.next_batch(self._admit)
        if scheduled.is_empty:
            return
        batch = build_batch(
            scheduled,
            self._cache,
            device=self._device,
            long_from=self._long_from,
            drafts=self._drafts(scheduled),
            last=self._last,
        )
        try:
            logits = self._runner.forward(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self._last = None
            self._shrink(error)
            return
        self._last = batch
        for sequence, count in batch.advanced:
            sequence.num_computed += count
            self._blocks.publish(sequence)
        self._read_prompts(batch, logits)
        outputs = self._sample(batch, logits)
        kept = [self._keep_drafted(*part) for part in self._drafted_logits(batch, logits)]
        outputs += [output for output, _ in kept] + self._score(batch, logits)
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
            most = min(spare, room, left)
            draft = sequence.drafter.draft(sequence.token_ids, most)
            if sequence.matcher is not None and most > 0:
                draft = sequence.matcher.draft(draft, most)
            # A guess is not worth somebody's place in the next step.
            is_room = self._blocks.num_free > len(scheduled.decode)
            if draft and is_room and self._grow(sequence, len(sequence.token_ids) + len(draft)):
                drafts[sequence] = draft
                spare -= len(draft)
        return drafts

    def _make_room(self) -> None:
        """Give every sequence that decodes a block for its next token, at others' expense if need be."""
        self._is_full = False
        for sequence in list(self._scheduler.running):
            if sequence.num_computed < len(sequence.blocks) * BLOCK:
                continue
            # One of them may have been preempted for the sake of another.
            if sequence.slot >= 0 and not sequence.is_prefilling:
                while not self._grow(sequence, sequence.num_computed + 1):
                    victim = self._scheduler.victim()
                    self._preempt(victim)
                    if victim is sequence:
                        break

    def _grow(self, sequence: Sequence, num_positions: int) -> bool:
        """Give a running sequence blocks for so many positions in all; False when too few are free."""
        first = len(sequence.blocks)
        if num_positions <= first * BLOCK:
            return True
        if not self._blocks.grow(sequence, num_positions):
            return False
        self._cache.set_blocks(sequence.slot, sequence.blocks, first)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's place and blocks; it goes on later from the tokens it has."""
        self._scheduler.preempt(sequence)
        self._release_place(sequence)
        sequence.num_computed = 0
        self._num_preempted += 1
        # Who was just sent away must not come back in the same step.
        self._is_full = True

    def _shrink(self, error: BaseException) -> None:
        """Go on with half as many after a step for which there was no memory; it changed nothing.

        Raises:
            BaseException: ``error``, when one sequence alone was too much.
        """
        scheduler = self._scheduler
        if len(scheduler.running) == 1 and scheduler.prefill_budget <= BLOCK:
            raise error
        scheduler.max_batch = max(1, len(scheduler.running) // 2)
        scheduler.prefill_budget = max(BLOCK, scheduler.prefill_budget // 2)
        while len(scheduler.running) > scheduler.max_batch:
            self._preempt(scheduler.victim())
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "a step ran out of memory (%s); from now on at most %d answers at once and %d prompt tokens "
            "in a step. Lower --memory-fraction, --max-batch or --prefill-budget",
            str(error).partition("\n")[0],
            scheduler.max_batch,
            scheduler.prefill_budget,
        )

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence its place; False when it should wait, for memory or for a prompt like its own."""
        if self._is_full:
            return False
        running = self._scheduler.running
        shared = self._blocks.look_up(sequence, running)
        if shared is None:
            return False
        # All of it at once, so that a prompt is never half read; then a block for everybody's answer.
        num_positions = len(sequence.token_ids) + max(1, sequence.num_branch_tokens)
        if not self._blocks.take(sequence, shared, num_positions, spare=len(running)):
            # Nobody behind it may overtake it for being smaller: it would never have its turn.
            self._is_full = True
            return False
        sequence.slot = self._cache.take_slot(sequence.blocks)
        if shared.tail:
            self._cache.copy(shared.source, sequence.blocks[len(shared.path)], shared.tail)
        sequence.num_computed = shared.length
        if not sequence.started_ns:
            sequence.num_cached = shared.length
            sequence.started_ns = time.monotonic_ns()
            sequence.entry = cast("DeviceLease", sequence.request.lease).entry
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
            if not s.is_plain and s.request.sampling.logprobs is not None
        }
        for i, sequence in enumerate(sequences):
            if sequence.matcher is not None:
                sequence.matcher.apply(rows[i])
        tokens = sample(rows, sequences, self._eos_ids)
        outputs = []
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            output = self._append(sequence, token)
            if i in wanted and output.error is None:
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
            whole.finish, whole.error = output.finish, output.error
            is_right = i < len(draft) and output.token_ids == [draft[i]]
            num_right += is_right
            if whole.finish is not None or whole.error is not None or not is_right:
                break
        assert sequence.drafter is not None
        sequence.drafter.learn(len(draft), num_right, len(sequence.token_ids))
        return whole, num_right

    def _append(self, sequence: Sequence, token: int) -> Output:
        """Add a token to its answer, and end the answer if that ends it."""
        request = sequence.request
        sampling = request.sampling
        assert sequence.text is not None
        tokens = sequence.token_ids
        num_generated = len(tokens) - len(request.prompt_ids) + 1
        if num_generated == 1:
            sequence.first_token_ns = time.monotonic_ns()
        tokens.append(token)
        if not sequence.is_plain and sampling.has_penalties:
            sequence.counts[token] = sequence.counts.get(token, 0) + 1
        output = Output(request_id=request.request_id, index=request.index, token_ids=[token])
        is_end = token in sampling.stop_token_ids or (
            token in self._eos_ids and not sampling.ignore_eos
        )
        reason: FinishReason | None = None
        matched = ""
        matcher = sequence.matcher
        if matcher is not None and not is_end and (problem := matcher.consume(token)):
            return self._end(sequence, error=InvalidRequest(problem, field="sampling.constraint"))
        if is_end:
            reason, matched = "stop", self._tokenizer.convert_ids_to_tokens(token)
        else:
            output.text = sequence.text.push(token)
            if sequence.text.matched_stop:
                if num_generated >= sampling.min_tokens:
                    reason, matched = "stop", sequence.text.matched_stop
            elif matcher is not None and matcher.is_finished:
                reason = "stop"
            elif num_generated >= sampling.max_tokens or len(tokens) >= self._cache.shape.context:
                reason = "length"
        if reason is not None:
            output.text += sequence.text.finish()
            finish = self._finish(sequence, reason, matched)
            ended = self._end(sequence, finish=finish)
            output.finish = ended.finish
        return output

    def _read_prompts(self, batch: Batch, logits: torch.Tensor) -> None:
        """Keep log probabilities of prompts' tokens, where they are wanted."""
        row = batch.first_prompt_row
        for sequence, count in batch.prompts:
            kept = sequence.prompt_logprobs
            tokens = sequence.token_ids[len(kept) + 1 : len(kept) + 1 + count]
            top = sequence.request.sampling.prompt_logprobs or 0
            kept += prompt_logprobs(logits[row : row + count], tokens, top)
            row += count

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
            prompt_logprobs=self._prompt_logprobs(sequence),
        )

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[PositionLogprobs, ...]:
        if sequence.request.sampling.prompt_logprobs is None:
            return ()
        first = PositionLogprobs(chosen=(sequence.token_ids[0], 0.0))
        return (first, *sequence.prompt_logprobs)

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
            self._release_place(sequence)
        sequence.request.lease.release()
        request = sequence.request
        return Output(
            request_id=request.request_id, index=request.index, finish=finish, error=error
        )

    def _release_place(self, sequence: Sequence) -> None:
        self._blocks.release(sequence)
        self._cache.release_slot(sequence.slot)
        sequence.slot = -1

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
                num_preempted=self._num_preempted,
                kv_tokens_used=(self._cache.num_blocks - self._blocks.num_free) * BLOCK,
                kv_tokens_total=self._cache.num_blocks * BLOCK,
            )
        )
        self._num_preempted = 0

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
