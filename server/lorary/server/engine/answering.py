"""From a step's logits to what callers are told: the next token of every answer, or its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, cast

import torch

from lorary.errors import InvalidRequest, LoraryError
from lorary.server.engine.request import DeviceLease, Finish, Output, PositionLogprobs
from lorary.server.engine.sampler import sample, score_labels, token_logprobs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from lorary.server.engine.batch import Batch
    from lorary.server.engine.request import FinishReason
    from lorary.server.engine.sequence import Sequence


class End(Protocol):
    """Ends a sequence: gives back everything it holds, and says what its caller is told."""

    def __call__(
        self,
        sequence: Sequence,
        *,
        finish: Finish | None = None,
        error: LoraryError | None = None,
    ) -> Output:
        """Return the last output, with one of the two."""
        ...


class Answers:
    """Chooses tokens and ends answers; used on the engine thread.

    Args:
        tokenizer: whose names tokens are reported by.
        eos_ids: tokens that end an answer.
        context: most tokens of a sequence.
        end: called once for every sequence that is done.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: frozenset[int],
        context: int,
        end: End,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._context = context
        self._end = end

    def of_step(self, batch: Batch, found: torch.Tensor | list[int]) -> tuple[list[Output], int]:
        """Go on with every sequence of a step.

        Args:
            batch: what the step was.
            found: its result: logits float32 [rows, vocab], which are changed in place, so in inference
                mode only; or of a greedy step the tokens. Hidden states are with the batch.

        Returns:
            An output for each sequence that has got further, and how many drafted tokens were right.
        """
        if isinstance(found, list):
            outputs = [*map(self._append, batch.samplers, found), *self._embed(batch)]
            return outputs, 0
        logits = found
        self._read_prompts(batch, logits)
        outputs = self._choose(batch.samplers, logits[: len(batch.samplers)])
        kept = [self._keep_drafted(*part) for part in self._drafted_logits(batch, logits)]
        outputs += [output for output, _ in kept] + self._score(batch, logits)
        outputs += self._embed(batch)
        return outputs, sum(count for _, count in kept)

    def _read_prompts(self, batch: Batch, logits: torch.Tensor) -> None:
        """Keep log probabilities of prompts' tokens, where they are wanted."""
        row = batch.first_prompt_row
        for sequence, count in batch.prompts:
            kept = sequence.prompt_logprobs
            tokens = sequence.token_ids[len(kept) + 1 : len(kept) + 1 + count]
            top = sequence.request.sampling.prompt_logprobs or 0
            if count:
                kept += token_logprobs(logits[row : row + count], tokens, [top] * count)
            row += count

    def _choose(self, sequences: tuple[Sequence, ...], rows: torch.Tensor) -> list[Output]:
        """Give every sequence its next token, from its row of logits."""
        if not sequences:
            return []
        # Reported log probabilities are those before penalties, which change rows in place.
        wanted: dict[int, torch.Tensor] = {}
        for i, sequence in enumerate(sequences):
            if sequence.is_plain:
                continue
            if sequence.request.sampling.logprobs is not None:
                wanted[i] = rows[i].clone()
            if sequence.matcher is not None:
                sequence.matcher.apply(rows[i])
        tokens = sample(rows, sequences, self._eos_ids)
        outputs = [*map(self._append, sequences, tokens)]
        if wanted:
            tops = [sequences[i].request.sampling.logprobs or 0 for i in wanted]
            logits = torch.stack(list(wanted.values()))
            found = token_logprobs(logits, [tokens[i] for i in wanted], tops)
            for i, logprobs in zip(wanted, found, strict=True):
                if outputs[i].error is None:
                    outputs[i].logprobs = (logprobs,)
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
        text, matcher = sequence.text, sequence.matcher
        assert text is not None
        tokens = sequence.token_ids
        tokens.append(token)
        num_generated = len(tokens) - sequence.num_prompt
        if num_generated == 1:
            sequence.first_token_ns = time.monotonic_ns()
        if not sequence.is_plain and sampling.has_penalties:
            sequence.counts[token] = sequence.counts.get(token, 0) + 1
        is_end = token in sampling.stop_token_ids or (
            token in self._eos_ids and not sampling.ignore_eos
        )
        reason: FinishReason | None = None
        piece = matched = ""
        if matcher is not None and not is_end and (problem := matcher.consume(token)):
            return self._end(sequence, error=InvalidRequest(problem, field="sampling.constraint"))
        if is_end:
            reason, matched = "stop", self._tokenizer.convert_ids_to_tokens(token)
        else:
            piece = text.push(token)
            if text.matched_stop:
                if num_generated >= sampling.min_tokens:
                    reason, matched = "stop", text.matched_stop
            elif matcher is not None and matcher.is_finished:
                reason = "stop"
            elif num_generated >= sampling.max_tokens or len(tokens) >= self._context:
                reason = "length"
        if reason is None:
            return Output(request.request_id, request.index, piece, [token])
        piece += text.finish()
        output = self._end(sequence, finish=self._finish(sequence, reason, matched))
        output.text, output.token_ids = piece, [token]
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

    def _embed(self, batch: Batch) -> list[Output]:
        """Pool hidden states; whoever's prompt has been read to its end has its vector."""
        row = 0
        outputs = []
        for sequence, count in batch.embedders:
            assert sequence.pool is not None
            if count:
                assert batch.hidden is not None, "a step that has not run"
                sequence.pool.add(batch.hidden[row : row + count])
            row += count
            if not sequence.num_uncomputed:
                sequence.first_token_ns = time.monotonic_ns()
                vector = sequence.pool.vector()
                finish = self._finish(sequence, "embedded", "", embedding=vector)
                outputs.append(self._end(sequence, finish=finish))
        return outputs

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        matched: str,
        scores: tuple[tuple[float, ...], ...] = (),
        embedding: tuple[float, ...] = (),
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
            cached_base_tokens=min(sequence.num_cached, sequence.request.active_from),
            cached_below_tokens=sequence.num_cached_below,
            queue_ns=max(0, sequence.started_ns - sequence.arrived_ns),
            adapter_load_ns=lease.load_ns,
            prefill_ns=sequence.first_token_ns - sequence.started_ns,
            decode_ns=now - sequence.first_token_ns,
            label_token_logprobs=scores,
            prompt_logprobs=self._prompt_logprobs(sequence),
            embedding=embedding,
            is_merged=sequence.merged is not None,
        )

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[PositionLogprobs, ...]:
        if sequence.request.sampling.prompt_logprobs is None:
            return ()
        first = PositionLogprobs(chosen=(sequence.token_ids[0], 0.0))
        return (first, *sequence.prompt_logprobs)
