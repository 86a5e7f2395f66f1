"""Answers that fit a grammar: what may come next, as a mask over a row's logits.

A grammar is compiled once for all calls that send it (``Compiler``), and walked by each answer on its own
(``TokenMatcher``): ``consume`` takes the token that was chosen and begins to work out, on a thread of its own
and without the interpreter's lock, which tokens may follow it; ``apply`` takes the result before the next one is
chosen. So the mask is made while the model reads that token.

Grammars come from strangers. Their text is bounded by ``validate``, their compilation and every mask by
``LIMITS``, their number by ``MAX_CACHED``; a grammar that outgrows its limits in the middle ends its own answer
with an error, and no other.
"""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorary.errors import InvalidRequest, MissingDependency
from lorary.server.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from transformers import PreTrainedTokenizerBase

    from lorary.server.engine.request import Constraint, Matcher

MAX_CACHED = 64
"""Compiled grammars that are kept; the one used longest ago goes first."""
LIMITS: dict[str, Any] = {
    # About 20 ms of building lexers, 7 ms of lexing and 3 ms of parsing for a mask, and 2 kB for each
    # state: what real schemas need a tenth of.
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
STACK_BYTES = 512 * 2**20
"""Of the thread that compiles. Compilers recurse over chains of rules: with the usual 8 MiB, 2,000 references
in a row end the process. It is address space; memory only as far as it is used."""
# Between the parts of JSON: nothing, a space, or a new line with its indentation. Without a bound, small
# models end in white space for ever.
_WHITESPACE = r"( |\n[ \t]{0,16})?"
_ENDED = ("NoExtension", "NoExtensionBias", "EndOfSentence")


class Compiler:
    """Compiles constraints for one tokenizer; the tokenizer's trie is made at the first of them.

    Args:
        tokenizer: the base's.
        vocab_size: columns of its logits.
        eos_ids: tokens that end an answer; they may follow where a sentence is whole.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, eos_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._trie: Any = None
        self._cache: Recent[Constraint, TokenGrammar] = Recent(MAX_CACHED)
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="lorary-masks")
        self._thread = _deep_thread("lorary-grammars")

    def submit(self, constraint: Constraint) -> Future[TokenGrammar]:
        """Return what will be a constraint's grammar; callable from any thread.

        One thread compiles, so a hostile grammar keeps the next ones waiting and nobody else.

        Raises (from the future):
            InvalidRequest: it cannot be compiled, with the compiler's own words.
            MissingDependency: llguidance is not installed.
        """
        return self._thread.submit(self._look_up, constraint)

    def _look_up(self, constraint: Constraint) -> TokenGrammar:
        found = self._cache.get(constraint)
        if found is None:
            found = self._compile(constraint)
            self._cache.put(constraint, found)
        return found

    def close(self) -> None:
        """Stop the threads; what has not begun is dropped."""
        for pool in (self._thread, self._masks):
            pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> TokenGrammar:
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependency(
                "constrained answers need llguidance: pip install 'lorary[server]'"
            ) from error
        if self._trie is None:
            self._trie = self._make_trie()
        try:
            grammar = _SOURCES[constraint.kind](llguidance.LLMatcher, constraint.text)
        except ValueError as error:
            raise _invalid(constraint, str(error)) from error
        make_limits: Any = llguidance.LLParserLimits
        limits = make_limits(**LIMITS)
        matcher = llguidance.LLMatcher(self._trie, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(constraint, matcher.get_error())
        return TokenGrammar(matcher, self._masks, max(self._vocab_size, len(self._tokenizer)))

    def _make_trie(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(
            self._tokenizer,  # type: ignore[arg-type]
            n_vocab=max(self._vocab_size, len(self._tokenizer)),
            eos_token=sorted(self._eos_ids),
        )


def _deep_thread(name: str) -> ThreadPoolExecutor:
    """Return a thread with room for deep recursion."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    before = threading.stack_size(STACK_BYTES)
    try:
        pool.submit(int).result()  # a pool starts its thread with its first piece of work
    finally:
        threading.stack_size(before)
    return pool


@dataclass(frozen=True, slots=True)
class TokenGrammar:
    """A compiled grammar, at its beginning."""

    start: Any
    masks: ThreadPoolExecutor
    num_tokens: int

    def matcher(self) -> Matcher:
        """Return a walk of its own for one answer."""
        return TokenMatcher(self.start.deep_copy(), self.masks, self.num_tokens)


class TokenMatcher:
    """Where one answer stands in its grammar; used by one thread at a time."""

    def __init__(self, matcher: Any, masks: ThreadPoolExecutor, num_tokens: int) -> None:
        self._matcher = matcher
        self._masks = masks
        self._bits = np.zeros((num_tokens + 31) // 32, dtype=np.int32)
        self._problem = ""
        self._pending: Future[None] = masks.submit(self._fill)
        self.is_finished = False

    def apply(self, logits: torch.Tensor) -> None:
        """Set what may not come next to -inf, in place; logits float32 [vocab]."""
        self._pending.result()
        if self._matcher.is_error():
            self._problem = _first_line(self._matcher.get_error())
            return
        flags = np.unpackbits(self._bits.view(np.uint8), count=len(logits), bitorder="little")
        if not flags.any():
            self._problem = "no token of this base can come next"
            return
        forbidden = torch.from_numpy(flags == 0)
        logits.masked_fill_(forbidden.to(logits.device), float("-inf"))

    def consume(self, token: int) -> str:
        """Go on by one token; return why that is impossible, "" when it is not."""
        if not self._problem and not self._matcher.consume_token(token):
            self._problem = _first_line(self._matcher.get_error())
        if self._problem:
            return (
                f"the constraint cannot be followed any further: {self._problem}. Make it simpler."
            )
        self.is_finished = self._matcher.is_stopped()
        if self.is_finished and self._matcher.stop_reason() not in _ENDED:
            return f"the constraint became too complex ({self._matcher.stop_reason()}). Make it simpler."
        if not self.is_finished:
            self._pending = self._masks.submit(self._fill)
        return ""

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        """Return what is known to come next, else as many of ``tokens`` as may; at most ``limit``."""
        self._pending.result()
        if self._matcher.is_error():
            return []
        known: list[int] = self._matcher.compute_ff_tokens()[:limit]
        return known or tokens[: self._matcher.validate_tokens(tokens)]

    def _fill(self) -> None:
        """Make the next mask; the method, and so this object, lives until it is made."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)


def _from_choices(compiler: Any, text: str) -> str:
    # Lark writes strings as JSON does.
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
    return str(compiler.grammar_from_lark(f"start: {texts}"))


def _from_schema(compiler: Any, text: str) -> str:
    return str(
        compiler.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
    )


_SOURCES: dict[str, Callable[[Any, str], str]] = {
    "choice": _from_choices,
    "json_schema": _from_schema,
    "regex": lambda compiler, text: str(compiler.grammar_from_regex(text)),
    "lark": lambda compiler, text: str(compiler.grammar_from_lark(text)),
}


def _invalid(constraint: Constraint, why: str) -> InvalidRequest:
    why = re.sub(r"\s+", " ", why).strip().removesuffix(".")
    return InvalidRequest(
        f"the constraint's {constraint.kind} cannot be used: {why}. Correct it.",
        field=f"sampling.{constraint.kind}",
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
