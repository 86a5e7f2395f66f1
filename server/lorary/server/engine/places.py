"""Who has a place in the cache: a slot, and blocks for keys and values.

A sequence gets all the blocks of its prompt at once, and one more whenever its answer fills the last. Where
none is left, the latest to arrive loses its place and reads its tokens again later.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, cast

import torch

from lorary.errors import Overloaded
from lorary.server.engine.blocks import BLOCK, Blocks
from lorary.server.engine.scheduler import RETRY_S

if TYPE_CHECKING:
    from lorary.server.engine.kv_cache import KVCache
    from lorary.server.engine.request import MergeableLease
    from lorary.server.engine.scheduler import Scheduled, Scheduler
    from lorary.server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

LAST_STRAW = 3
"""So many requests in a row without memory for the smallest of steps: there is nobody to serve any more."""


class Places:
    """The places of running sequences; used on the engine thread.

    Args:
        cache: where keys and values lie.
        scheduler: who runs, and who should lose its place first.
        share: whether prompts share the blocks of what they begin with.

    Attributes:
        blocks: which blocks are free, and what is in the others.
        num_preempted: places taken away since it was last set to 0.
    """

    def __init__(self, cache: KVCache, scheduler: Scheduler, *, share: bool) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self.blocks = Blocks(cache.num_blocks, share=share, shared_layers=cache.shape.shared_layers)
        self.num_preempted = 0
        self._is_full = False
        self._first_limits = scheduler.max_batch, scheduler.prefill_budget
        # Requests that had no memory for the smallest of steps since any step went well.
        self._hopeless: set[str] = set()

    def make_room(self) -> None:
        """Give every sequence that decodes a block for its next token, at others' expense if need be."""
        self._is_full = False
        for sequence in list(self._scheduler.running):
            if sequence.num_computed < len(sequence.blocks) * BLOCK:
                continue
            # One of them may have been preempted for the sake of another.
            if sequence.slot >= 0 and not sequence.is_prefilling:
                while not self.grow(sequence, sequence.num_computed + 1):
                    victim = self._scheduler.victim()
                    self.preempt(victim)
                    if victim is sequence:
                        break

    def move_on(self, advanced: tuple[tuple[Sequence, int], ...]) -> None:
        """Note so many more positions of each as computed; what has filled a block may be shared."""
        for sequence, count in advanced:
            sequence.num_computed += count
            if count > 1 or not sequence.num_computed % BLOCK:
                self.blocks.publish(sequence)

    def grow(self, sequence: Sequence, num_positions: int) -> bool:
        """Give a running sequence blocks for so many positions in all; False when too few are free."""
        first = len(sequence.blocks)
        if num_positions <= first * BLOCK:
            return True
        if not self.blocks.grow(sequence, num_positions):
            return False
        self._cache.set_blocks(sequence.slot, sequence.blocks, first)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's place and blocks; it goes on later from the tokens it has."""
        self._scheduler.preempt(sequence)
        self.release(sequence)
        sequence.num_computed = sequence.num_below = 0
        self.num_preempted += 1
        # Who was just sent away must not come back in the same step.
        self._is_full = True

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence its place; False when it should wait, for memory or for a prompt like its own."""
        if self._is_full:
            return False
        running = self._scheduler.running
        request = sequence.request
        lease = cast("MergeableLease", request.lease)
        sequence.merged = None if request.execution == "batched" else lease.take()
        request.is_on_merged = sequence.merged is not None
        sequence.entry = lease.entry if sequence.merged is None else None
        shared = self.blocks.look_up(sequence, running)
        if shared is None:
            return False
        # All of it at once, so that a prompt is never half read; then a block for everybody's answer.
        num_positions = len(sequence.token_ids) + max(1, sequence.num_branch_tokens)
        if not self.blocks.take(sequence, shared, num_positions, spare=len(running)):
            # Nobody behind it may overtake it for being smaller: it would never have its turn.
            self._is_full = True
            return False
        sequence.slot = self._cache.take_slot(sequence.blocks)
        if shared.tail:
            self._cache.copy(shared.source, sequence.blocks[len(shared.path)], shared.tail)
        if shared.below:
            first, count = len(shared.path), len(shared.below)
            self._cache.copy_below(shared.below, sequence.blocks[first : first + count])
        sequence.num_computed, sequence.num_below = shared.length, shared.num_below
        if not sequence.started_ns:
            sequence.num_cached = shared.length
            sequence.num_cached_below = max(0, shared.num_below - shared.length)
            sequence.started_ns = time.monotonic_ns()
        return True

    def release(self, sequence: Sequence) -> None:
        """Give back a sequence's slot and blocks; it has both."""
        self.blocks.release(sequence)
        self._cache.release_slot(sequence.slot)
        sequence.slot = -1

    def shrink(
        self, scheduled: Scheduled, error: BaseException
    ) -> tuple[Sequence, Overloaded] | None:
        """Make less of the next step, after a pass for which there was no memory; it changed nothing.

        Of several, half go on; one that is alone reads its prompt in chunks of half the size, down to a block.

        Returns:
            Who was alone with nothing left to halve, and what it is told: it must be ended. The limits are
            again what they were at first, for it may be what they were lowered for. None: try again.

        Raises:
            BaseException: ``error``, when ``LAST_STRAW`` different requests in a row had no memory for a step
                that nobody's could be smaller than.
        """
        scheduler = self._scheduler
        budget = scheduler.prefill_budget
        num_read = sum(count for _, count in scheduled.prefill)
        self._give_back_cached()
        if len(scheduler.running) > 1:
            scheduler.max_batch = len(scheduler.running) // 2
            while len(scheduler.running) > scheduler.max_batch:
                self.preempt(scheduler.victim())
        elif num_read > BLOCK:
            budget = num_read
        else:
            return self._refuse(scheduler.running[0], num_read, error)
        # One that is below a block as it is stays there.
        scheduler.prefill_budget = min(scheduler.prefill_budget, max(BLOCK, budget // 2))
        logger.warning(
            "a step ran out of memory (%s); from now on at most %d answers at once and %d prompt tokens "
            "in a step. Lower --memory-fraction, --max-batch or --prefill-budget",
            _first_line(error),
            scheduler.max_batch,
            scheduler.prefill_budget,
        )
        return None

    def _refuse(
        self, sequence: Sequence, num_read: int, error: BaseException
    ) -> tuple[Sequence, Overloaded]:
        """Return what a sequence is told whose step has no memory, though it is alone and as small as it gets."""
        request = sequence.request
        num_tokens = max(1, num_read)
        if sequence.num_computed + num_read == len(sequence.token_ids):
            num_tokens += sequence.num_branch_tokens
        # A longer one may be too long, or have too many labels. This one says that nothing fits.
        if sequence.num_computed + num_tokens <= BLOCK:
            self._note_hopeless(sequence, error)
        self._restore_limits()
        logger.warning(
            "request '%s' was refused: alone, a step of %d tokens behind %d others ran out of memory (%s). "
            "Lower --memory-fraction or --max-batch, or give the server more memory",
            request.request_id,
            num_tokens,
            sequence.num_computed,
            _first_line(error),
        )
        return sequence, Overloaded(
            f"this server has no memory for a step of {num_tokens} tokens behind {sequence.num_computed} "
            f"others, not even alone: all labels and up to {BLOCK} tokens of a prompt are one step at least. "
            "Send a shorter prompt or fewer labels; or start the server with a lower --memory-fraction or "
            "--max-batch, or with more memory",
            retry_after_s=RETRY_S[1],
        )

    def narrow(
        self, readers: tuple[Sequence, ...], num_rows: int, error: BaseException
    ) -> Overloaded:
        """Have fewer answers at once, after a pass for whose tokens there was no memory.

        Args:
            readers: whom the pass was for.
            num_rows: rows of logits and of hidden states that it found.
            error: what was raised.

        Returns:
            What ``readers`` are told: they must be ended.

        Raises:
            BaseException: ``error``, when ``LAST_STRAW`` different requests in a row had no memory for a step
                that nobody's could be smaller than.
        """
        scheduler = self._scheduler
        self._give_back_cached()
        if len(readers) > 1:
            scheduler.max_batch = min(scheduler.max_batch, len(readers) // 2)
        else:
            # Many labels or log probabilities of a long prompt say nothing about others.
            if num_rows <= BLOCK:
                self._note_hopeless(readers[0], error)
            self._restore_limits()
        logger.warning(
            "there was no memory to choose the tokens of %d answers from %d rows (%s): they have ended with an "
            "error; from now on at most %d at once. Lower --memory-fraction or --max-batch",
            len(readers),
            num_rows,
            _first_line(error),
            scheduler.max_batch,
        )
        return Overloaded(
            f"this server had no memory to choose the tokens of a step: {num_rows} rows of all tokens' "
            f"probabilities for {len(readers)} answers, this one among them. Ask again, for fewer are answered "
            "at once from now on; without the prompt's log probabilities, or with fewer labels, it is smaller",
            retry_after_s=RETRY_S[0],
        )

    def _give_back_cached(self) -> None:
        """Have torch give back what it keeps of a GPU's memory, which may be in pieces that nothing fits into."""
        if self._cache.k.device.type == "cuda":
            torch.cuda.empty_cache()

    def _restore_limits(self) -> None:
        """Have as many answers and prompt tokens at once as at first: they may have been lowered for who is refused."""
        self._scheduler.max_batch, self._scheduler.prefill_budget = self._first_limits

    def note_success(self) -> None:
        """Begin to count anew who had no memory for the smallest of steps: one has gone well to its end."""
        self._hopeless.clear()

    def _note_hopeless(self, sequence: Sequence, error: BaseException) -> None:
        """Count a request that nothing smaller could be made of; raise ``error`` at the last straw."""
        self._hopeless.add(sequence.request.request_id)
        if len(self._hopeless) >= LAST_STRAW:
            raise error


def _first_line(error: BaseException) -> str:
    """Return what an error says, without the allocator's advice."""
    return str(error).partition("\n")[0] or type(error).__name__
