"""What each method is, and what it can be combined with: read by recipes before anything is loaded.

A combination is refused where a library breaks, where the result would not be what the method's paper
describes, or where no adapter could be published that computes what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from lorary.errors import InvalidRecipe
from lorary.registry.manifest import SERVED_KINDS

if TYPE_CHECKING:
    from lorary.trainer.recipe import MethodRecipe, Recipe

MethodName = Literal[
    "lora", "qlora", "rslora", "alora", "dora", "pissa", "olora", "eva", "loftq", "lora-fa",
    "lora-plus", "vera", "adalora", "delta-lora", "full",
]  # fmt: skip
OptimizerName = Literal["auto", "adamw", "lora-fa", "lora-plus"]
Quantization = Literal["none", "int8", "nf4"]
_ANY: Final[tuple[Quantization, ...]] = ("none", "int8", "nf4")

OPTIONS: Final = (
    *("invocation", "lr_ratio", "delta_start", "delta_ratio", "target_rank", "rank_spread"),
    "svd_iterations",
)
"""Keys of ``method`` that belong to some methods only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a method is.

    Attributes:
        what: one line for the table in the docs.
        paper: arXiv number.
        quantizations: of the base; the first is what ``auto`` means.
        why_not: why one of the others is refused, by its name.
        options: the keys of ``OPTIONS`` that it has.
        default_alpha: what ``alpha: 0`` means: twice the rank, the rank, or 16; ``none``: it has no alpha.
        optimizer: what ``auto`` means.
        refused_optimizers: why an optimizer is refused, by its name.
        no_dropout: why dropout is refused; empty where it is not.
        causal_only: why only tasks of causal language models can have it; empty where all can.
    """

    what: str
    paper: str
    quantizations: tuple[Quantization, ...] = _ANY
    why_not: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    options: frozenset[str] = frozenset()
    default_alpha: Literal["twice", "rank", "sixteen", "none"] = "twice"
    optimizer: OptimizerName = "adamw"
    refused_optimizers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    no_dropout: str = ""
    causal_only: str = ""


def _of_the_whole_base(what: str) -> dict[str, str]:
    reason = f"{what}, and a quantized base has lost them. Set method.quantization to none"
    return {"int8": reason, "nf4": reason}


RULES: Final[Mapping[MethodName, Rules]] = {
    "lora": Rules(
        what="`W + s B A`; A random, B zero",
        paper="2106.09685",
        quantizations=("none",),
        why_not=dict.fromkeys(("int8", "nf4"), "set method.name to qlora"),
    ),
    "qlora": Rules(
        what="LoRA on a base in nf4 (with double quantization) or int8",
        paper="2305.14314",
        quantizations=("nf4", "int8"),
        why_not={"none": "nothing would be quantized; use lora"},
    ),
    "rslora": Rules(
        what="LoRA with `s = alpha / sqrt(rank)`", paper="2312.03732", default_alpha="sixteen"
    ),
    "alora": Rules(
        what="LoRA that is off until `invocation` stands in the prompt; before it is the base",
        paper="2504.12397",
        options=frozenset({"invocation"}),
        causal_only="only what answers a prompt has something before it",
    ),
    "dora": Rules(
        what="`W + s B A`, each row scaled to a learned length",
        paper="2402.09353",
        quantizations=("none", "nf4"),
        why_not={
            "int8": "DoRA needs the length of each row of the weight, and PEFT cannot read it back from "
            "an int8 layer (AttributeError). Use nf4 or none"
        },
        refused_optimizers={
            "lora-fa": "LoRA-FA's optimizer pairs parameters by the word 'lora' in their names, and "
            "DoRA's magnitude vectors, which have it too, break its pairs. Use adamw"
        },
    ),
    "pissa": Rules(
        what="LoRA that starts as the largest singular vectors of W",
        paper="2404.02948",
        quantizations=("none",),
        why_not=_of_the_whole_base("PiSSA starts from the singular vectors of the base's weights"),
        options=frozenset({"svd_iterations"}),
        default_alpha="rank",
    ),
    "olora": Rules(
        what="LoRA that starts as the first columns of W's QR decomposition",
        paper="2406.01775",
        quantizations=("none",),
        why_not=_of_the_whole_base("OLoRA starts from a QR decomposition of the base's weights"),
        default_alpha="rank",
    ),
    "eva": Rules(
        what="LoRA whose A starts as the main directions of each layer's inputs, with ranks to match",
        paper="2410.07170",
        quantizations=("none",),
        why_not=_of_the_whole_base("EVA starts from the activations that the base's weights give"),
        options=frozenset({"rank_spread"}),
        causal_only="its start is measured on a causal language model",
    ),
    "loftq": Rules(
        what="QLoRA that starts as the best answer of its rank to what nf4 lost",
        paper="2310.08659",
        quantizations=("nf4",),
        why_not={
            "none": "LoftQ makes up for what quantization loses, and nothing is lost here; use lora",
            "int8": "LoftQ makes up for what 4 bits lose; an int8 base loses too little. Use nf4",
        },
        causal_only="its start is computed from the weights of a causal language model",
        default_alpha="rank",
    ),
    "lora-fa": Rules(
        what="LoRA with A frozen as drawn; activations are kept at the rank's width only",
        paper="2308.03303",
        optimizer="lora-fa",
    ),
    "lora-plus": Rules(
        what="LoRA whose B learns `lr_ratio` times as fast as A",
        paper="2402.12354",
        optimizer="lora-plus",
    ),
    "vera": Rules(
        what="random A and B shared by all layers, and two learned vectors for each layer",
        paper="2310.11454",
        default_alpha="none",
        refused_optimizers={
            "lora-fa": "VeRA's A is frozen already, and it has no B to learn. Use adamw",
            "lora-plus": "VeRA learns no B that could learn faster than A. Use adamw",
        },
        causal_only="a trained head beside it could not be kept as LoRA",
    ),
    "adalora": Rules(
        what="`P Λ Q` for each layer; the least important ranks are taken away while it trains",
        paper="2303.10512",
        options=frozenset({"target_rank"}),
        refused_optimizers={
            "lora-fa": "AdaLoRA learns A, and its third factor breaks the optimizer's pairs. Use adamw",
            "lora-plus": "AdaLoRA's A and B are the two sides of one decomposition. Use adamw",
        },
        causal_only="a trained head beside it could not be kept as LoRA",
    ),
    "delta-lora": Rules(
        what="LoRA whose every step also moves W, by `delta_ratio` times the step of `s B A`",
        paper="2309.02411",
        options=frozenset({"delta_start", "delta_ratio"}),
        no_dropout="the step of B A stands for a gradient of W, which it is not with dropout on its way "
        "(section 3.3 of the paper). Set method.dropout to 0",
    ),
    "full": Rules(
        what="the weights themselves; what comes nearest to their change at `rank` is published",
        paper="2405.09673",
        quantizations=("none",),
        why_not=dict.fromkeys(
            ("int8", "nf4"),
            "the weights themselves are learned, and a quantized weight takes neither a gradient nor a "
            "step as small as an optimizer's. Set method.quantization to none, or method.name to qlora",
        ),
        default_alpha="none",
        refused_optimizers={
            "lora-fa": "it learns no B along a frozen A, but whole weights. Use adamw",
            "lora-plus": "it learns no B that could learn faster than A, but whole weights. Use adamw",
        },
        no_dropout="there is no A whose input could be dropped. Set method.dropout to 0",
    ),
}


def check(recipe: MethodRecipe) -> None:
    """Check a recipe's ``method`` by itself.

    Raises:
        InvalidRecipe: a combination that cannot work, with the reason.
    """
    name, rules = recipe.name, RULES[recipe.name]
    quantization, optimizer = recipe.base_quantization, recipe.resolved_optimizer
    if quantization not in rules.quantizations:
        raise InvalidRecipe(
            f"method.quantization is '{quantization}' with {name}: {rules.why_not[quantization]}."
        )
    if recipe.dropout and rules.no_dropout:
        raise InvalidRecipe(
            f"method.dropout is {recipe.dropout:g} with {name}: {rules.no_dropout}."
        )
    if optimizer in rules.refused_optimizers:
        raise InvalidRecipe(
            f"method.optimizer is '{optimizer}' with {name}: {rules.refused_optimizers[optimizer]}."
        )
    if name in ("lora-fa", "lora-plus") and optimizer != name:
        raise InvalidRecipe(
            f"method.optimizer is '{optimizer}' with {name}, which is LoRA with an optimizer of its own. "
            "Leave method.optimizer out, or set method.name to lora."
        )
    if recipe.alpha and rules.default_alpha == "none":
        raise InvalidRecipe(f"method.alpha is {recipe.alpha:g}, and {name} has none; leave it out.")
    defaults = {spec.name: spec.default for spec in fields(recipe)}
    for option in OPTIONS:
        if getattr(recipe, option) != defaults[option] and not _has(recipe, option):
            owners = [owner for owner, found in RULES.items() if option in found.options]
            raise InvalidRecipe(
                f"method.{option} is for {', '.join(owners) or 'the optimizer lora-plus'}, and "
                f"method.name is {name}; leave it out."
            )
    if name == "adalora" and recipe.resolved_target_rank >= recipe.rank:
        raise InvalidRecipe(
            f"method.target_rank is {recipe.resolved_target_rank} and method.rank, from which AdaLoRA "
            f"comes down to it, is {recipe.rank}; raise method.rank, to half more or twice as much."
        )


def check_plan(recipe: Recipe) -> None:
    """Check ``method`` against ``training`` and ``task``.

    Raises:
        InvalidRecipe: an aLoRA without an invocation, with packed rows or checkpoints of activations; Delta-LoRA would begin after the
            last step; LoRA-FA or LoRA+ with an optimizer
            that is not theirs; a task that the method has no form for.
    """
    own, plain = recipe.method.resolved_optimizer, recipe.training.optimizer
    if own != "adamw" and plain != "adamw":
        raise InvalidRecipe(
            f"training.optimizer is '{plain}', and {own} brings an AdamW of its own; leave one of them out."
        )
    why = RULES[recipe.method.name].causal_only
    if why and recipe.task.kind not in SERVED_KINDS:
        raise InvalidRecipe(
            f"method.name is {recipe.method.name} with task.kind {recipe.task.kind}: {why}. Use lora."
        )
    if recipe.method.name == "alora":
        if not recipe.method.invocation:
            raise InvalidRecipe(
                "method.invocation is empty with alora: the adapter would never be on. Name the text that "
                "turns it on, such as the end of task.template."
            )
        if recipe.training.packing:
            raise InvalidRecipe(
                "training.packing is set with alora: PEFT looks for one invocation in a row, and a packed row "
                "has one for each of its samples. Leave it out."
            )
        if recipe.training.gradient_checkpointing:
            raise InvalidRecipe(
                "training.gradient_checkpointing is set with alora: PEFT 0.21 loses track of the invocations "
                "at the first validation (a forward pass without a backward one). Leave it out."
            )
    start, steps = recipe.method.delta_start, recipe.training.max_steps
    if recipe.method.name == "delta-lora" and start >= steps:
        raise InvalidRecipe(
            f"method.delta_start is {start} and the run has {steps} steps, so the base would never move; "
            "lower it, or set method.name to lora."
        )


def _has(recipe: MethodRecipe, option: str) -> bool:
    if option == "lr_ratio":
        return recipe.resolved_optimizer == "lora-plus"
    return option in RULES[recipe.name].options
