"""Measure a model on held-out examples the way it will be used: greedy answers, scored labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F

from lorary.trainer.batches import IGNORED, collate
from lorary.trainer.encoding import Encoder
from lorary.trainer.head import head_reads
from lorary.trainer.loop import selected_logits
from lorary.trainer.metrics import calibration_sums, label_sums, perplexity_sums, text_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from lorary.bases.prompts import PromptBuilder
    from lorary.trainer.bootstrap import Sums
    from lorary.trainer.encoding import Row
    from lorary.trainer.examples import Example
    from lorary.trainer.recipe import Recipe

_MAX_LOGIT_ROWS = 1024  # each as wide as the vocabulary, in float32: 200 MB for 49,152 tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures, and what the model said to each example.

    Attributes:
        metrics: by name, rounded.
        predictions: the likeliest label (classification) or the generated text.
        generated: the generated text.
        sums: what the metrics were made of, for resampling; a metric may lack it.
        label_probabilities: of a classification, [examples, labels], each row adding up to 1.
    """

    metrics: dict[str, float]
    predictions: tuple[str, ...]
    generated: tuple[str, ...]
    sums: Mapping[str, Sums] = field(default_factory=dict)
    label_probabilities: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(
        cls,
        sums: Mapping[str, Sums],
        predictions: Sequence[str],
        generated: Sequence[str],
        label_probabilities: Sequence[tuple[float, ...]] = (),
    ) -> Self:
        """Return the evaluation whose metrics are the values of ``sums``."""
        return cls(
            metrics={name: round(one.value, 4) for name, one in sums.items()},
            predictions=tuple(predictions),
            generated=tuple(generated),
            sums=sums,
            label_probabilities=tuple(label_probabilities),
        )


class Evaluator:
    """Asks one model the recipe's questions; the caller sets which adapter is active."""

    def __init__(self, model: Any, tokenizer: Any, builder: PromptBuilder, recipe: Recipe) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._builder = builder
        self._recipe = recipe
        self._task = recipe.task.to_manifest()
        self._encoder = Encoder(builder, self._task)

    @torch.inference_mode()
    def evaluate(
        self, examples: Sequence[Example], advance: Callable[[int], None] | None = None
    ) -> Evaluation:
        """Answer every example and score the answers.

        Args:
            examples: held out.
            advance: told after each batch how many more examples are done.
        """
        config, was_training = self._model.config, self._model.training
        used_cache, attention = config.use_cache, config._attn_implementation
        self._model.eval()
        config.use_cache = True
        if attention != "sdpa":  # chosen for its backward pass; there is none here
            self._model.get_base_model().set_attn_implementation("sdpa")
        try:
            # A slice of hidden states is not contiguous, and on a CPU torch then multiplies row by
            # row with a copy of the whole head each: 3.6 GB and 7 s for 64 rows (docs/log.md).
            with head_reads(self._model, torch.Tensor.contiguous):
                return self._evaluate(examples, advance or (lambda _count: None))
        finally:
            self._model.get_base_model().set_attn_implementation(attention)
            config.use_cache = used_cache
            self._model.train(was_training)

    def _evaluate(self, examples: Sequence[Example], advance: Callable[[int], None]) -> Evaluation:
        prompts = [self._encoder.prompt(example) for example in examples]
        references = [example.target for example in examples]
        generated = [""] * len(prompts)
        nats, num_tokens = [0.0] * len(prompts), [0] * len(prompts)
        probabilities: list[tuple[float, ...]] = [()] * len(prompts)
        is_read_only = self._recipe.metric == "perplexity"
        labels = [self._builder.label_ids(label) for label in self._task.labels]
        longest = self._recipe.training.max_length
        for batch in _by_length(prompts, self._recipe.evaluation.batch_size):
            owned = [(i, row) for i in batch for row in self._encoder.rows(examples[i], longest)]
            for (i, row), read in zip(owned, self.nats([row for _, row in owned]), strict=True):
                nats[i] += read
                num_tokens[i] += sum(row.is_learned())
            if not is_read_only:
                part = [prompts[i] for i in batch]
                texts, first_logits = self.generate(part)
                for i, text in zip(batch, texts, strict=True):
                    generated[i] = text
            if labels:
                scores = self.label_logprobs(part, labels, first_logits).softmax(-1).tolist()
                for i, shares in zip(batch, scores, strict=True):
                    probabilities[i] = tuple(shares)
            advance(len(batch))
        foreseen = {"perplexity": perplexity_sums(nats, num_tokens)}
        if is_read_only:
            return Evaluation.of(foreseen, generated, generated)
        if not labels:
            sums = text_sums(self._recipe.metric, generated, references)
            return Evaluation.of(sums | foreseen, generated, generated)
        sure = [max(row) for row in probabilities]
        predictions = [
            self._task.labels[row.index(top)] for row, top in zip(probabilities, sure, strict=True)
        ]
        is_right = [p == r for p, r in zip(predictions, references, strict=True)]
        sums = label_sums(predictions, generated, references)
        sums |= {"ece": calibration_sums(sure, is_right)}
        return Evaluation.of(sums | foreseen, predictions, generated, probabilities)

    def nats(self, rows: Sequence[Row]) -> list[float]:
        """Return the negative log likelihood of each row's learned tokens, in nats.

        Each is read after all tokens before it; an end token that is learned counts like any other.
        """
        found: list[float] = []
        for part in _by_learned(rows):
            tensors = collate(part, int(self._tokenizer.pad_token_id))
            input_ids, labels = (
                tensors[name].to(self._model.device) for name in ("input_ids", "labels")
            )
            logits, targets = selected_logits(self._model, input_ids, labels)
            nats = F.cross_entropy(logits.float(), targets, reduction="none")
            lengths = (labels[:, 1:] != IGNORED).sum(dim=1).tolist()
            found += [float(one.double().sum()) for one in torch.split(nats, lengths)]
        return found

    def generate(self, prompts: Sequence[Sequence[int]]) -> tuple[list[str], Tensor]:
        """Answer a batch greedily, without any of the base's own sampling settings.

        Returns:
            The texts, cut at stop strings, outer white space removed; and the logits of the first
            new token, float32 [B, vocab].
        """
        first: list[Tensor] = []

        def keep_first(_ids: Tensor, logits: Tensor) -> Tensor:
            if not first:
                first.append(logits.float())
            return logits

        from transformers import GenerationConfig

        input_ids, mask = self._pad_left(prompts)
        eos = self._tokenizer.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=self._task.max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        sequences = self._model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=[keep_first],
        )
        texts = []
        for row in sequences[:, input_ids.shape[1] :].tolist():
            ids = row[: row.index(eos)] if eos in row else row
            texts.append(self._cut(self._tokenizer.decode(ids, skip_special_tokens=True)))
        return texts, first[0]

    def label_logprobs(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], first: Tensor
    ) -> Tensor:
        """Return the log probability of each label as the answer's beginning, [B, labels].

        ``first`` are the logits after the prompt; they suffice for labels of one token, longer ones
        are read in another pass.
        """
        logprobs = F.log_softmax(first, dim=-1)
        scores = torch.stack([logprobs[:, ids[0]] for ids in labels], dim=1)
        for k, ids in enumerate(labels):
            if len(ids) > 1:
                rows = [[*prompt, *ids[:-1]] for prompt in prompts]
                input_ids, mask = self._pad_left(rows)
                logits = self._model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                    logits_to_keep=len(ids) - 1,
                    use_cache=False,
                ).logits
                rest = torch.tensor(ids[1:], device=logits.device).view(1, -1, 1)
                later = F.log_softmax(logits.float(), dim=-1).gather(
                    2, rest.expand(len(rows), -1, 1)
                )
                scores[:, k] += later.sum(dim=(1, 2))
        return scores

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask, int64 [B, T], prompts ending in the last column."""
        device = self._model.device
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for i, prompt in enumerate(prompts):
            input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        return input_ids.to(device), mask.to(device)

    def _cut(self, text: str) -> str:
        """End a text before the first stop string."""
        ends = [text.find(stop) for stop in self._task.stop if stop in text]
        return text[: min(ends, default=len(text))].strip()


def _by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest prompts first, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _by_learned(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield runs of rows with few enough learned tokens for a table of logits."""
    part: list[Row] = []
    count = 0
    for row in rows:
        length = len(row.input_ids) - row.num_prompt
        if part and count + length > _MAX_LOGIT_ROWS:
            yield part
            part, count = [], 0
        part.append(row)
        count += length
    if part:
        yield part
