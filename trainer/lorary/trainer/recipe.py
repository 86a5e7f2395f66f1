"""What to train, in one YAML file: typed, strict, checked in full before any work.

A sample; everything but ``name`` and ``data.source`` has a default::

    name: sentiment
    base: smollm2-135m
    task: {kind: classification, template: "…{{ text }}…", labels: [negative, positive]}
    data: {source: movie-reviews, num_test: 400}
    method: {rank: 8}
    training: {max_steps: 60, batch_size: 16, learning_rate: 5.0e-4}
    evaluation: {batch_size: 32}

``--set training.learning_rate=1e-3`` changes one key. Unknown keys are errors that name the nearest
valid one; docs/recipes.md has the table of all keys, generated from the classes below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lorary.errors import InvalidRecipe
from lorary.registry.manifest import Task, TaskKind
from lorary.trainer.methods import rules
from lorary.trainer.search.space import SearchRecipe

Shape = Literal["auto", "template", "text", "completion", "chat", "alpaca", "sharegpt"]
Metric = Literal["auto", "accuracy", "rouge", "bleu", "exact_match", "perplexity"]
_LABELLED = ("classification", "sequence_classification", "token_classification")
_TEXTUAL = ("generation", "seq2seq")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecipe:
    """What the adapter does; becomes the manifest's task."""

    kind: TaskKind = "generation"
    """What is learned; see docs/training.md. The first two are a causal language model's own answers,
    and the only ones that servers serve."""
    template: str = ""
    """Jinja over the input columns (``text`` first); renders the whole prompt, special tokens too. Of data in
    another shape than ``template`` it is only what servers put a caller's plain text into, and made when empty."""
    labels: tuple[str, ...] = ()
    """The label set of a classification, at least two."""
    max_new_tokens: int = 64
    """Longest answer, in tokens, when evaluated and when served by default; 1 to 4096."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, beside the base's end token; at most 16."""

    def __post_init__(self) -> None:
        _within("task.max_new_tokens", self.max_new_tokens, 1, 4096)
        if self.template and not self.template.strip():
            raise InvalidRecipe("task.template is empty; write the whole prompt, with {{ text }}.")
        if len(self.stop) > 16 or "" in self.stop:
            raise InvalidRecipe("task.stop holds an empty string or more than 16; fix the list.")
        if self.kind not in _LABELLED and self.labels:
            raise InvalidRecipe(
                f"task.labels is set for a {self.kind}; set task.kind to classification."
            )
        if self.kind in _LABELLED and len(self.labels) < 2:
            raise InvalidRecipe(
                f"task.labels has {len(self.labels)} labels; a {self.kind} needs at least two."
            )
        if len(set(self.labels)) != len(self.labels):
            raise InvalidRecipe(f"task.labels repeats a label: {list(self.labels)}.")

    @property
    def target_is_label(self) -> bool:
        """Whether the target of each example is one of ``labels``."""
        return self.kind in ("classification", "sequence_classification")

    def to_manifest(self) -> Task:
        """Return the manifest's form."""
        return Task(
            kind=self.kind,
            template=self.template or None,
            labels=self.labels,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """Where examples come from, and which are held out."""

    source: str
    """``movie-reviews``, ``news-headlines``, ``jupyter-fr``, ``file`` or ``hub``."""
    path: str = ""
    """For ``file``: a .jsonl, .json, .csv, .parquet or .txt file, relative to the recipe's folder. For ``hub``: the
    data set's id, ``owner/name``."""
    subset: str = ""
    """For ``hub``: which of the data set's configurations; empty is its only one."""
    split: str = "train"
    """For ``hub``: which of its splits is read, and split again into train, validation and test."""
    revision: str = ""
    """For ``hub``: a branch, tag or commit; empty is the newest."""
    shape: Shape = "auto"
    """What the columns are and what is learned; auto is ``template`` where there is one, else by the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """For ``file`` and ``hub``: what the shape calls a column to what the data calls it; default: the same names."""
    text_unit: Literal["line", "paragraph"] = "line"
    """For .txt files: what one text is."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Read in several passes and keep tokens on disk, so that memory does not grow with texts; auto is above 128 MiB."""
    num_test: int = 200
    """Examples held out to measure base and adapter; at least 1."""
    num_validation: int = 64
    """Examples held out to choose the best step; 0 turns early stopping off."""
    max_train: int = 0
    """Train on at most this many examples; 0 is all."""
    max_similarity: float = 0.5
    """Held-out examples share at most this word-Jaccard with any other; (0, 1]; 1 is no limit."""
    max_words: int = 0
    """Cut each ``text`` to this many words; 0 does not cut."""
    min_words: int = 1
    """Leave out examples whose ``text`` has fewer words."""
    seed: int = 0
    """Salt of the split's hash; another seed is another split."""

    def __post_init__(self) -> None:
        _within("data.num_test", self.num_test, 1, 1_000_000)
        _within("data.num_validation", self.num_validation, 0, 1_000_000)
        _within("data.max_train", self.max_train, 0, 1_000_000_000)
        _within("data.max_similarity", self.max_similarity, 0.01, 1.0)
        _within("data.max_words", self.max_words, 0, 1_000_000)
        _within("data.min_words", self.min_words, 1, 1_000_000)
        if self.source in ("file", "hub") and not self.path:
            what = "a file" if self.source == "file" else "a data set, owner/name"
            raise InvalidRecipe(
                f"data.source is '{self.source}' but data.path is empty; name {what}."
            )
        if self.source not in ("file", "hub") and (self.path or self.columns):
            raise InvalidRecipe(
                f"data.path and data.columns are for source 'file' and 'hub', not '{self.source}'."
            )
        if self.source not in ("file", "hub") and self.shape not in ("auto", "template", "text"):
            raise InvalidRecipe(
                f"data.shape is '{self.shape}' for the source '{self.source}', which has texts and "
                "targets; use template or text."
            )
        if self.source != "hub" and (self.subset or self.revision or self.split != "train"):
            raise InvalidRecipe("data.subset, data.split and data.revision are for source 'hub'.")
        if self.max_words and self.shape in ("completion", "chat", "alpaca", "sharegpt"):
            raise InvalidRecipe(
                f"data.max_words cuts texts, which the shape '{self.shape}' has not; "
                "rows that are too long are left out by training.max_length."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRecipe:
    """Which method, of which rank."""

    name: rules.MethodName = "lora"
    """What is trained; docs/methods.md compares them."""
    quantization: Literal["auto", "none", "int8", "nf4"] = "auto"
    """Of the base while training; auto is nf4 for qlora and loftq, and none for the others."""
    quantization_plan: str = ""
    """For qlora: a file of ``lorary quantize-plan``, relative to the recipe; its layers that stay whole do so here."""
    rank: int = 8
    """Rank of every pair A, B; 1 to 512. The rank at the start for adalora; what is published for full; vera wants 256."""
    alpha: float = 0.0
    """Scale times rank; 0 means twice the rank; the rank for pissa, olora and loftq; 16 for rslora; vera and full have none."""
    dropout: float = 0.0
    """On the input of A; [0, 1). Above 0 trains on a slower path."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Module name endings, or ``all-linear``: every linear layer but the output head."""
    layers_to_transform: tuple[int, ...] = ()
    """Numbers, from 0, of the model's layers that are changed; empty means all. Servers share what is before the first (docs/residency.md)."""
    optimizer: rules.OptimizerName = "auto"
    """auto is lora-fa and lora-plus for the methods of these names, and ``training.optimizer`` for the others, as adamw is."""
    invocation: str = ""
    """For alora: the text from which on the adapter is on; every prompt holds it, as tokens of its own."""
    lr_ratio: float = 0.0
    """For the optimizer lora-plus: learning rate of B over that of A; 0 means 16."""
    delta_start: int = 0
    """For delta-lora: K, the steps before the base begins to move."""
    delta_ratio: float = 0.0
    """For delta-lora: λ, how far the base moves for a step of B A; 0 means 0.5."""
    target_rank: int = 0
    """For adalora: mean rank of a layer in the end; 0 means half of ``rank``."""
    rank_spread: float = 2.0
    """For eva: largest rank of a layer over ``rank``; 1 gives every layer the same. 1 to 16."""
    svd_iterations: int = 16
    """For pissa: power iterations of the fast SVD; 0 computes the whole one."""

    def __post_init__(self) -> None:
        _within("method.rank", self.rank, 1, 512)
        _within("method.alpha", self.alpha, 0.0, 1e4)
        _within("method.dropout", self.dropout, 0.0, 0.99)
        _within("method.lr_ratio", self.lr_ratio, 0.0, 1e4)
        _within("method.delta_start", self.delta_start, 0, 10_000_000)
        _within("method.delta_ratio", self.delta_ratio, 0.0, 100.0)
        _within("method.target_rank", self.target_rank, 0, 512)
        _within("method.rank_spread", self.rank_spread, 1.0, 16.0)
        _within("method.svd_iterations", self.svd_iterations, 0, 1000)
        if not self.target_modules:
            raise InvalidRecipe("method.target_modules is empty; use [all-linear].")
        for number in self.layers_to_transform:
            _within("method.layers_to_transform", number, 0, 9999)
        if len(set(self.layers_to_transform)) != len(self.layers_to_transform):
            raise InvalidRecipe(
                f"method.layers_to_transform repeats a number: {list(self.layers_to_transform)}."
            )
        if self.quantization_plan and self.name != "qlora":
            raise InvalidRecipe(
                f"method.quantization_plan is set with {self.name}; set method.name to qlora, or remove it."
            )
        rules.check(self)

    @property
    def base_quantization(self) -> Literal["none", "int8", "nf4"]:
        """The quantization with ``auto`` resolved."""
        if self.quantization != "auto":
            return self.quantization
        quantizations = rules.RULES[self.name].quantizations
        return quantizations[0]

    @property
    def scaled_alpha(self) -> float:
        """``alpha`` with its default resolved; of vera and full, which have none, the rank: a scale of 1."""
        if self.alpha:
            return self.alpha
        by_default = {"twice": 2.0 * self.rank, "sixteen": 16.0}
        return by_default.get(rules.RULES[self.name].default_alpha, float(self.rank))

    @property
    def resolved_optimizer(self) -> rules.OptimizerName:
        """The optimizer with ``auto`` resolved."""
        return rules.RULES[self.name].optimizer if self.optimizer == "auto" else self.optimizer

    @property
    def resolved_target_rank(self) -> int:
        """``target_rank`` with its default resolved."""
        return self.target_rank or max(1, self.rank // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecipe:
    """How long, how fast, in which order."""

    max_steps: int = 100
    """Optimizer steps; 1 to 10 million."""
    batch_size: int = 8
    """Rows of a forward pass."""
    gradient_accumulation: int = 1
    """Forward passes of an optimizer step."""
    learning_rate: float = 5e-4
    """Peak of the schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up."""
    warmup: float = 0.1
    """Share of the steps over which it rises; [0, 1)."""
    weight_decay: float = 0.0
    """AdamW's; [0, 1]."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    """8-bit moments take a quarter of the memory; paged ones move to the host when a GPU is full."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    eval_every: int = 0
    """Steps between validation losses (and checkpoints); 0 is a quarter of max_steps."""
    patience: int = 3
    """Stop after this many validations without a better loss."""
    max_length: int = 1024
    """Longest row in tokens, prompt and answer; longer ones are left out and counted."""
    packing: bool = False
    """Put several samples into each row of max_length tokens, none of which sees another; batch_size counts such rows."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the base's arithmetic; what is trained is always float32. auto is what the device does well."""
    device: str = "auto"
    """A torch device; auto is cuda when there is one, else cpu."""
    gradient_checkpointing: bool = False
    """Trade a third more compute for less memory."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where figures go while it trains; tensorboard writes to `<output>.tensorboard`."""
    seed: int = 0
    """Of initial weights, order and dropout."""

    def __post_init__(self) -> None:
        _within("training.max_steps", self.max_steps, 1, 10_000_000)
        _within("training.batch_size", self.batch_size, 1, 65_536)
        _within("training.gradient_accumulation", self.gradient_accumulation, 1, 65_536)
        _within("training.learning_rate", self.learning_rate, 1e-9, 1.0)
        _within("training.warmup", self.warmup, 0.0, 0.99)
        _within("training.weight_decay", self.weight_decay, 0.0, 1.0)
        _within("training.max_grad_norm", self.max_grad_norm, 1e-6, 1e6)
        _within("training.eval_every", self.eval_every, 0, 10_000_000)
        _within("training.patience", self.patience, 1, 1_000_000)
        _within("training.max_length", self.max_length, 2, 10_000_000)
        if len(set(self.trackers)) != len(self.trackers):
            raise InvalidRecipe(f"training.trackers repeats one: {list(self.trackers)}.")
        _within("training.seed", self.seed, 0, 2**32 - 1)

    @property
    def steps_between_evals(self) -> int:
        """``eval_every`` with its default resolved."""
        return self.eval_every or max(1, -(-self.max_steps // 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecipe:
    """How base and adapter are measured on the held-out examples."""

    metric: Metric = "auto"
    """auto is perplexity for plain texts, rouge for other answers, else what docs/training.md says of the kind."""
    batch_size: int = 32
    """Prompts answered at a time."""
    num_golden_probes: int = 3
    """Held-out prompts whose logits go into the manifest, for servers to replay; 1 to 16."""
    skip_base: bool = False
    """Measure the adapter only."""
    num_resamples: int = 1000
    """Resamples of the held-out examples that intervals are made from; 0 makes none."""
    confidence: float = 0.95
    """Of the intervals; between 0.5 and 0.999."""
    report: bool = True
    """Write report.html and its pictures; the numbers are written in any case."""
    num_report_examples: int = 12
    """Held-out examples that the report quotes of each kind: won, lost, same; 0 quotes none."""
    num_attention_maps: int = 2
    """Held-out prompts whose attention the report draws, before and after; 0 draws none."""

    def __post_init__(self) -> None:
        _within("evaluation.batch_size", self.batch_size, 1, 65_536)
        _within("evaluation.num_golden_probes", self.num_golden_probes, 1, 16)
        _within("evaluation.num_resamples", self.num_resamples, 0, 1_000_000)
        _within("evaluation.confidence", self.confidence, 0.5, 0.999)
        _within("evaluation.num_report_examples", self.num_report_examples, 0, 10_000)
        _within("evaluation.num_attention_maps", self.num_attention_maps, 0, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole training run."""

    name: str
    """What the adapter is called; lower-case letters, digits, ``-``, ``_``, ``.``, ``/``."""
    base: str = "smollm2-135m"
    """Short name, local folder or Hub id of the base."""
    description: str = ""
    """One line for people; goes into the manifest."""
    task: TaskRecipe = field(default_factory=TaskRecipe)
    data: DataRecipe
    method: MethodRecipe = field(default_factory=MethodRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    search: SearchRecipe = field(default_factory=SearchRecipe)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}(/[a-z0-9][a-z0-9._-]{0,63})?", self.name):
            raise InvalidRecipe(
                f"name is '{self.name}'; use lower-case letters, digits, '-', '_', '.', and at most "
                "one '/'."
            )
        if not self.base.strip():
            raise InvalidRecipe("base is empty; name one, such as smollm2-135m.")
        kind, metric = self.task.kind, self.evaluation.metric
        has_columns = self.data.source in ("file", "hub") and self.data.shape == "auto"
        needs_template = kind != "generation" or self.data.shape == "template"
        if not self.task.template and (
            needs_template or (self.data.shape == "auto" and not has_columns)
        ):
            raise InvalidRecipe("task.template is empty; write the whole prompt, with {{ text }}.")
        if kind != "generation" and self.data.shape not in ("auto", "template"):
            raise InvalidRecipe(
                f"data.shape is '{self.data.shape}' for a {kind}; its prompts are the "
                "template's, so use template."
            )
        if metric == "accuracy" and not self.task.target_is_label:
            use = "rouge or bleu" if kind in _TEXTUAL else "auto"
            raise InvalidRecipe(f"evaluation.metric is accuracy for a {kind}; use {use}.")
        if self.data.shape == "text" and self.evaluation.metric not in ("auto", "perplexity"):
            raise InvalidRecipe(
                f"evaluation.metric is {self.evaluation.metric} for plain texts, which have no answers; "
                "use perplexity."
            )
        if metric not in ("auto", "accuracy") and kind not in _TEXTUAL:
            use = "accuracy" if self.task.target_is_label else "auto"
            raise InvalidRecipe(f"evaluation.metric is {metric} for a {kind}; use {use}.")
        if metric == "perplexity" and kind == "seq2seq":
            raise InvalidRecipe("evaluation.metric is perplexity for a seq2seq; use rouge or bleu.")

    @property
    def metric(self) -> Metric:
        """``evaluation.metric`` with its default resolved."""
        if self.evaluation.metric != "auto":
            return self.evaluation.metric
        if self.data.shape == "text":
            return "perplexity"
        return "rouge" if self.task.kind in _TEXTUAL else "accuracy"


def _within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside ``[low, high]``, NaN included."""
    if not low <= value <= high:
        raise InvalidRecipe(f"{name} is {value}; it must be between {low:g} and {high:g}.")
