"""From an example to token ids, and which of them are learned.

What is learned is decided on *characters*: the text is rendered whole, the ranges that a model would have
to write are known as characters, and the tokenizer's offsets say which tokens lie in them. Everything is
tokenized jointly, as a server will tokenize a conversation that goes on, with one exception. A server reads a
prompt alone, so where joint tokenization would merge characters across the end of a prompt, or would give the
prompt other tokens, the text is cut there: the ids before an answer are always those that a server computes.

The token that ends an answer is learned with it, or nothing would ever stop.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.bases.prompts import PromptBuilder
    from lorary.registry.manifest import Task
    from lorary.trainer.examples import Example

MAX_OPENING = 64
"""Tokens of a text that are its prompt, where one is needed: to probe and to show what a model writes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Token ids to train on: the first ``num_prompt`` are read, the rest are learned.

    Attributes:
        input_ids: at least one more than ``num_prompt``.
        num_prompt: at least 1, for nothing predicts a row's first token.
        unlearned: ranges ``[start, end)`` behind the prompt that are read only: what others say between
            the answers of a conversation.
        starts: of a packed row: where every sample but the first begins.
    """

    input_ids: tuple[int, ...]
    num_prompt: int
    unlearned: tuple[tuple[int, int], ...] = ()
    starts: tuple[int, ...] = ()

    def is_learned(self) -> list[bool]:
        """Return for every token whether it is learned."""
        learned = [i >= self.num_prompt for i in range(len(self.input_ids))]
        for start, end in self.unlearned:
            learned[start:end] = [False] * (end - start)
        return learned


class Encoder:
    """Encodes examples of any form for one base and task.

    Raises (all methods):
        InvalidRecipe: naming the example's place: the template cannot be rendered, a text holds a special
            token, or no token would be learned.
    """

    def __init__(self, builder: PromptBuilder, task: Task) -> None:
        self._builder = builder
        self._task = task

    def rows(self, example: Example, max_length: int) -> list[Row]:
        """Return the rows of an example, of any length; only ``text`` is cut, into rows of ``max_length``.

        One row, but where a chat template writes a turn in another way once it is not the last (some drop
        earlier reasoning): then each assistant turn is a row of its own, as a server would have asked for it.
        """
        try:
            if example.form == "template":
                rows = [self._from_template(example)]
            elif example.form == "text":
                rows = self._from_text(example, max_length)
            elif example.form == "completion":
                rows = [self._from_completion(example)]
            else:
                rows = self._from_chat(example)
        except InvalidRequest as error:
            raise InvalidRecipe(f"{example.place} cannot be tokenized: {error}") from error
        if not rows or not all(any(row.is_learned()) for row in rows):
            raise InvalidRecipe(
                f"{example.place} has no token that would be learned; correct it or leave it out."
            )
        return rows

    def prompt(self, example: Example) -> list[int]:
        """Return the ids that a server would compute for the example's question.

        Of a ``text``, which asks nothing, its beginning: half of its tokens, at most ``MAX_OPENING``.
        """
        try:
            if example.form == "template":
                return self._builder.from_task(self._task, example.inputs)
            if example.form == "text":
                ids = self._builder.encode(self._with_bos(example.inputs["text"]))
                return ids[: max(1, min(MAX_OPENING, len(ids) // 2))]
            if example.form == "completion":
                return self._builder.from_prompt(self._with_bos(example.inputs["text"]))
            self._check_chat(example)
            text = self._builder.render_chat(example.messages[:-1], example.tools)
            return self._builder.encode(text)
        except InvalidRequest as error:
            raise InvalidRecipe(f"{example.place} cannot be tokenized: {error}") from error

    def _from_template(self, example: Example) -> Row:
        """Return prompt and answer tokenized apart, as labels are scored."""
        prompt = self._builder.from_task(self._task, example.inputs)
        answer = self._builder.completion_ids(example.target)
        return Row(input_ids=(*prompt, *answer), num_prompt=len(prompt))

    def _from_text(self, example: Example, max_length: int) -> list[Row]:
        """Return all tokens and the end, in rows of like length that share one token.

        Each begins with the last token of the row before, so every token but the first is learned, once.
        """
        text = example.inputs["text"]
        self._builder.check_text(text, field="text")
        ids = [*self._builder.encode(self._with_bos(text)), self._builder.eos_id]
        num_learned = len(ids) - 1
        num_rows = -(-num_learned // (max_length - 1))
        step = -(-num_learned // num_rows)
        return [
            Row(input_ids=tuple(ids[i : i + step + 1]), num_prompt=1)
            for i in range(0, num_learned, step)
        ]

    def _from_completion(self, example: Example) -> Row:
        prompt = self._with_bos(example.inputs["text"])
        self._builder.check_text(example.target, field="completion")
        text = prompt + example.target
        ids, learned = self._learned(text, [(len(prompt), len(text))])
        return _row([*ids, self._builder.eos_id], [*learned, (learned[-1][1], len(ids) + 1)])

    def _from_chat(self, example: Example) -> list[Row]:
        self._check_chat(example)
        rows = []
        for text, answers in self._conversations(example):
            ids, learned = self._learned(text, answers)
            learned = [(start, self._end(ids, start, end)) for start, end in learned]
            start, end = learned[-1]
            ids = ids[:end]
            if ids[-1] != self._builder.eos_id:  # a template whose turns end in another way
                ids.append(self._builder.eos_id)
                learned[-1] = (start, end + 1)
            rows.append(_row(ids, learned))
        return rows

    def _end(self, ids: Sequence[int], start: int, end: int) -> int:
        """Return where an answer ends: behind its last special token, before what the template adds."""
        specials = [i for i in range(start, end) if ids[i] in self._builder.special_ids]
        return specials[-1] + 1 if specials else end

    def _conversations(self, example: Example) -> list[tuple[str, list[tuple[int, int]]]]:
        """Return rendered texts, each with the ranges of characters that its answers are."""
        turns, tools = example.messages, example.tools
        whole = self._builder.render_chat(turns, tools, is_answered=True)
        found: list[tuple[str, int, int]] = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            asked = self._builder.render_chat(turns[:i], tools)
            answered = (
                self._builder.render_chat(turns[: i + 1], tools, is_answered=True)
                if i + 1 < len(turns)
                else whole
            )
            if not answered.startswith(asked):
                raise InvalidRequest(
                    f"the base's chat template does not begin turn {i} as it asks for it, so what a "
                    "model would have to write is not known. Use the shape 'template' or 'completion'.",
                    field="messages",
                )
            found.append((answered, len(asked), len(answered)))
        if all(whole.startswith(answered) for answered, _, _ in found):
            return [(whole, [(start, end) for _, start, end in found])]
        return [(answered, [(start, end)]) for answered, start, end in found]

    def _learned(
        self, text: str, answers: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's ids, and for each range of characters its range of ids.

        The ids before each range are those of the text before it alone.
        """
        cuts: list[int] = []
        while True:
            ids, token_starts, num_before = self._encode_cut(text, cuts)
            ranges = []
            for start, end in answers:
                if start not in num_before:
                    asked = self._builder.encode(text[:start])
                    if ids[: len(asked)] != asked:
                        cuts.append(start)
                        break
                    num_before[start] = len(asked)
                last = len(ids) if end == len(text) else bisect_left(token_starts, end)
                ranges.append((num_before[start], last))
            else:
                return ids, ranges

    def _encode_cut(
        self, text: str, cuts: Sequence[int]
    ) -> tuple[list[int], list[int], dict[int, int]]:
        """Tokenize a text in parts.

        Returns:
            The ids, the first character of each, and for each cut how many ids are before it.
        """
        bounds = [0, *sorted(cuts), len(text)]
        ids: list[int] = []
        starts: list[int] = []
        num_before = {}
        for begin, end in itertools.pairwise(bounds):
            if begin:
                num_before[begin] = len(ids)
            part, offsets = self._builder.encode_with_offsets(text[begin:end])
            ids += part
            starts += [begin + start for start, _ in offsets]
        return ids, starts, num_before

    def _check_chat(self, example: Example) -> None:
        """Refuse what the base's template would drop in silence, and contents that pose as structure."""
        template = self._builder.chat_template
        if template is None:
            raise InvalidRequest(
                "this base has no chat template. Use an instruct base, or the shape 'template'.",
                field="messages",
            )
        needs = {"tools": example.tools, "tool_calls": _any_key(example.messages, "tool_calls")}
        for name, is_needed in needs.items():
            if is_needed and name not in template:
                raise InvalidRequest(
                    f"the base's chat template knows no {name}, and would leave them out. Use a base "
                    "whose template does, or write them into the contents.",
                    field=name,
                )
        for i, turn in enumerate(example.messages):
            if turn["content"]:
                self._builder.check_text(turn["content"], field=f"messages[{i}].content")

    def _with_bos(self, text: str) -> str:
        """Put the token before a text that the tokenizer would."""
        bos = self._builder.bos
        return text if not bos or text.startswith(bos) else bos + text


def _row(ids: Sequence[int], learned: Sequence[tuple[int, int]]) -> Row:
    """Return the row of which ``learned`` is learned; it ends with the last of these ranges."""
    merged: list[tuple[int, int]] = []
    for start, end in learned:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        elif end > start:
            merged.append((start, end))
    between = [(a[1], b[0]) for a, b in itertools.pairwise(merged)]
    num_prompt = merged[0][0] if merged else len(ids)
    return Row(input_ids=tuple(ids), num_prompt=max(1, num_prompt), unlearned=tuple(between))


def _any_key(messages: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(key in message for message in messages)
