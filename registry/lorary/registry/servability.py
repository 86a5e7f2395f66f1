"""What other servers do with an adapter: load it, load something else, or refuse it, and why.

The rules were read from their sources: vLLM 0.32 (``lora/peft_helper.py``, ``lora/lora_model.py``), llama.cpp
b11434 (``convert_lora_to_gguf.py``, ``llama-adapter.cpp``), PEFT 0.21 (``utils/save_and_load.py``). They are
about the files as they are; what a registry keeps is canonical, and most of them do not apply to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from lorary.registry.base import BaseCard

Server = Literal["lorary", "vllm", "llama.cpp", "peft"]
SERVERS: Final[tuple[Server, ...]] = ("lorary", "vllm", "llama.cpp", "peft")
Outcome = Literal["loads", "deviates", "refuses"]

VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK: Final = 16
_VLLM_INITS: Final = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_LORA_NAME: Final = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")
# These re-run at load in PEFT and subtract from the resident base.
_PEFT_INITS: Final = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """One thing that a server does with an adapter."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a server does with an adapter.

    Attributes:
        server: which.
        outcome: ``loads`` as trained; ``deviates``: loads, and computes something else; ``refuses``.
        reasons: why, and what to set; may be there when all is well, too.
    """

    server: Server
    outcome: Outcome
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the rules look at.

    Attributes:
        config: ``adapter_config.json`` as it is.
        names: of the tensors.
        ranks: first dimension of every ``lora_A``.
        dtypes: of the tensors.
        missing: how many targeted modules have no tensors.
    """

    config: Mapping[str, Any]
    names: Collection[str]
    ranks: Collection[int]
    dtypes: Collection[str]
    missing: int


def judge(server: Server, traits: Traits, card: BaseCard, problems: int) -> Verdict:
    """Return what ``server`` does.

    Args:
        server: which.
        traits: of the adapter.
        card: the base.
        problems: how many the validator found; for Lorary they decide.
    """
    rules = {"lorary": _lorary, "vllm": _vllm, "llama.cpp": _llama_cpp, "peft": _peft}
    remarks = [*rules[server](traits, card)]
    if server == "lorary" and problems:
        text = f"{problems} problem{'s' if problems > 1 else ''}, listed above"
        remarks.append(Remark(outcome="refuses", reason=text))
    worst: Outcome = "loads"
    for remark in remarks:
        if remark.outcome == "refuses" or worst == "loads":
            worst = remark.outcome
    return Verdict(server=server, outcome=worst, reasons=tuple(r.reason for r in remarks))


def _loads(reason: str) -> Remark:
    return Remark(outcome="loads", reason=reason)


def _deviates(reason: str) -> Remark:
    return Remark(outcome="deviates", reason=reason)


def _refuses(reason: str) -> Remark:
    return Remark(outcome="refuses", reason=reason)


def _lorary(traits: Traits, card: BaseCard) -> Iterator[Remark]:
    kind = traits.config.get("peft_type")
    task_type = traits.config.get("task_type")
    if task_type not in ("CAUSAL_LM", None):
        yield _refuses(f"task_type {task_type} is kept and not served")
    elif traits.config.get("use_dora") is True:
        yield _loads("DoRA is served by itself: not in a composition, and not with a scale")
    elif traits.config.get("alora_invocation_tokens"):
        yield _loads("aLoRA: a prompt without its invocation is refused; it is not composed")
    elif kind != "LORA":
        yield _loads(f"{kind} becomes plain LoRA at the push")


def _vllm(traits: Traits, card: BaseCard) -> Iterator[Remark]:
    config = traits.config
    if config.get("peft_type") != "LORA":
        yield _refuses(f"reads LoRA only, not {config.get('peft_type')}")
    for key, why in {
        "use_dora": "does not support DoRA",
        "lora_bias": "does not support biases on lora_B",
        "alora_invocation_tokens": "does not support activated LoRA",
        "layer_replication": "does not support replicated layers",
        "use_bdlora": "does not support block-diagonal LoRA",
        "use_qalora": "does not support QALoRA",
    }.items():
        if config.get(key):
            yield _refuses(why)
    if config.get("bias", "none") != "none":
        yield _refuses("does not support trained biases")
    if set(config.get("modules_to_save") or ()) - {"classifier", "score"}:
        yield _refuses("replaces no modules but classifiers")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _VLLM_INITS:
        yield _refuses(f"does not take init_lora_weights '{init[:40]}'; convert the adapter")
    foreign = [n for n in traits.names if not _LORA_NAME.fullmatch(n) and "embed" not in n]
    if foreign and config.get("peft_type") == "LORA" and not config.get("use_dora"):
        yield _refuses(f"knows no tensor named {ascii(foreign[0])[:80]}")
    if any("base_layer" in name or name.endswith("embed_tokens.weight") for name in traits.names):
        yield _deviates("leaves out the base's embeddings that the file holds")
    rank = max(traits.ranks, default=0)
    fitting = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    if fitting is None:
        yield _refuses(f"rank {rank} is above its largest, {VLLM_RANKS[-1]}")
    elif fitting > _VLLM_DEFAULT_RANK:
        yield _loads(f"needs --max-lora-rank {fitting}: its default is {_VLLM_DEFAULT_RANK}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield _loads(
            "releases before 0.32 ignore rank_pattern and alpha_pattern: wrong scales there"
        )
    if traits.missing:
        yield _deviates(f"{traits.missing} targeted modules without tensors stay as in the base")
    if "F32" in traits.dtypes:
        yield _loads("rounds float32 to the model's dtype")


def _llama_cpp(traits: Traits, card: BaseCard) -> Iterator[Remark]:
    config = traits.config
    if config.get("peft_type") != "LORA":
        yield _refuses(f"its converter reads LoRA only, not {config.get('peft_type')}")
        return
    if config.get("use_dora"):
        yield _refuses("its converter stops at DoRA's magnitude vectors")
    foreign = [
        name
        for name in traits.names
        if not _LORA_NAME.fullmatch(name)
        and ".base_layer.weight" not in name
        and "_magnitude" not in name
    ]
    if foreign:
        yield _refuses(f"its converter stops at tensor {ascii(foreign[0])[:80]}")
    heads = tuple(f".{head}.lora_" for head in card.head_modules)
    if any(head in name for name in traits.names for head in heads):
        yield _refuses("its converter takes no output head that is tied to the token table")
    if config.get("alora_invocation_tokens"):
        yield _loads(
            "an aLoRA is left off, with the base answering, where a prompt lacks its invocation"
        )
    if config.get("use_rslora"):
        yield _deviates("its converter ignores rsLoRA: every scale is too small by √r")
    if config.get("alpha_pattern"):
        yield _deviates("its converter ignores alpha_pattern: those modules get the global alpha")
    if config.get("layer_replication"):
        yield _refuses("replicated layers are not in its base")
    if traits.missing:
        yield _deviates(f"{traits.missing} targeted modules without tensors stay as in the base")
    yield _loads("registry export --to gguf writes a file with the scales folded in")


def _peft(traits: Traits, card: BaseCard) -> Iterator[Remark]:
    config = traits.config
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_PEFT_INITS):
        yield _deviates(f"init_lora_weights '{init[:40]}' runs again at load and changes the base")
    if config.get("alora_invocation_tokens"):
        yield _loads(
            "an aLoRA is left off, with the base answering, where a prompt lacks its invocation"
        )
    if config.get("layer_replication"):
        yield _deviates("layer_replication rebuilds the base for every adapter")
    if config.get("auto_mapping"):
        yield _deviates("auto_mapping names Python classes to import")
    base = [name for name in traits.names if _is_of_the_base(name, card)]
    if base:
        yield _deviates(
            f"overwrites {len(base)} weights of the base in silence, such as {base[0][:80]}"
        )
    if traits.missing:
        yield _deviates(f"{traits.missing} targeted modules without tensors stay without effect")


def _is_of_the_base(name: str, card: BaseCard) -> bool:
    plain = name.removeprefix("base_model.model.").removesuffix(".weight")
    last = plain.rpartition(".")[2]
    return name.endswith(".weight") and (
        last == "base_layer"
        or plain in card.modules
        or plain in card.head_modules
        or "norm" in last
        or "embed" in last
    )
