"""Adapters for tasks that no server serves: encoders under a classifier, encoder-decoders, bodies alone.

A registry keeps them, canonical and checked as exactly as the others: the manifest's kind says which
model class the base is loaded as, so which names its modules have; its labels say how wide the head is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Final

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.base import BaseCard
from lorary.registry.findings import Report
from lorary.registry.manifest import SERVED_KINDS, Manifest, Task, TaskKind
from lorary.registry.safetensors_file import TensorInfo
from lorary.registry.strict_json import show
from lorary.registry.tensor_layout import PREFIX

TASK_TYPES: Final[dict[TaskKind, str]] = {
    "generation": "CAUSAL_LM",
    "classification": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "embeddings": "FEATURE_EXTRACTION",
}
# Where a family's own layers are inside a model with a head; of all others it is "model.".
_BODIES: Final = {
    "Bert": "bert.",
    "Deberta": "deberta.",
    "DebertaV2": "deberta.",
    "DistilBert": "distilbert.",
    "Electra": "electra.",
    "EncoderDecoder": "",
    "GPT2": "transformer.",
    "MT5": "",
    "Roberta": "roberta.",
    "T5": "",
    "XLMRoberta": "roberta.",
}
_CLASS: Final = re.compile(r"(?P<family>\w+?)(?:Model|MTModel|LMHeadModel|For[A-Z]\w*)")
# What a head may consist of: h is the base's hidden size, n the number of labels.
_DENSE: Final = {"weight": "hh", "bias": "h"}
_FLAT: Final = {"weight": "nh", "bias": "n"}
_DEEP: Final = {
    **{f"dense.{name}": shape for name, shape in _DENSE.items()},
    **{f"out_proj.{name}": shape for name, shape in _FLAT.items()},
}
_POOLER: Final = {f"dense.{name}": shape for name, shape in _DENSE.items()}
_HEADS: Final[dict[TaskKind, tuple[tuple[str, Mapping[str, str]], ...]]] = {
    "sequence_classification": (
        ("classifier", _FLAT),
        ("classifier", _DEEP),
        ("classification_head", _DEEP),
        ("score", {"weight": "nh"}),
    ),
    "token_classification": (("classifier", _FLAT), ("score", _FLAT)),
}


def is_served(task: Task) -> bool:
    """Whether servers serve this kind of task."""
    return task.kind in SERVED_KINDS


def kept_task(manifest: Manifest | None) -> Task | None:
    """Return the task that a manifest names, if registries keep its kind and servers do not serve it."""
    return None if manifest is None or is_served(manifest.task) else manifest.task


def why_not_served(task: Task) -> str:
    """Return what a server says to an adapter of a kind that it does not serve."""
    return (
        f"the adapter is for the task kind '{task.kind}', which is not served: servers generate with a "
        f"causal language model ({', '.join(SERVED_KINDS)}). Pull it and load it with PEFT "
        f"(task_type {TASK_TYPES[task.kind]})."
    )


def live_card(card: BaseCard, task: Task, tensors: Collection[str]) -> BaseCard:
    """Return ``card`` with the module names that the base has when it is loaded for ``task``.

    A checkpoint of the bare body lacks the prefix that the body has under a head, and an embedding model
    has none. A pooler counts only where the adapter changes it: not every head has one.

    Args:
        card: of the base as stored.
        task: of a kind that is not served.
        tensors: names of the adapter's tensors.
    """
    match = _CLASS.fullmatch(card.architecture)
    body = _BODIES.get(match["family"] if match else "", "model.")
    is_whole = not any(name.startswith(body) for name in card.modules)
    prefix = "" if task.kind == "embeddings" else body
    names = {
        name: prefix + name.removeprefix(body)
        for name in card.modules
        if is_whole or name.startswith(body)
    }
    kept = {
        name: live
        for name, live in names.items()
        if "pooler" not in live.split(".") or f"{PREFIX}{live}.lora_A.weight" in tensors
    }
    return dataclasses.replace(
        card,
        modules={live: card.modules[name] for name, live in kept.items()},
        norms={live: card.norms[name] for name, live in kept.items() if name in card.norms},
    )


def check_heads(
    tensors: Mapping[str, TensorInfo],
    declared: Collection[str],
    task: Task,
    card: BaseCard | None,
    report: Report,
) -> dict[str, TensorInfo]:
    """Return the tensors of whole modules that the task may bring; whatever is not right is reported.

    Args:
        tensors: all of the adapter's.
        declared: the configuration's ``modules_to_save``.
        task: of a kind that is not served.
        card: of the base; ``None`` leaves shapes unchecked.
        report: told of every problem.
    """
    found = {n: i for n, i in tensors.items() if ".lora_" not in n and n.startswith(PREFIX)}
    if not found:
        return {}
    for head, layout in _HEADS.get(task.kind, ()):
        wanted = {f"{PREFIX}{head}.{name}": shape for name, shape in layout.items()}
        if not wanted.keys() <= found.keys():
            continue
        rest = found.keys() - wanted.keys()
        pooler = next((n.removesuffix("dense.weight") for n in rest if _is_pooler(n)), "")
        if pooler:
            wanted |= {f"{pooler}{name}": shape for name, shape in _POOLER.items()}
        if wanted.keys() != found.keys():
            continue
        whole = {f"{PREFIX}{name}." for name in declared}
        undeclared = [n for n in found if not n.startswith(tuple(whole))]
        if undeclared:
            report(
                CorruptArtifact(
                    f"tensor {undeclared[0]} is a part of a head that adapter_config.json does not name "
                    "in modules_to_save"
                )
            )
        if card is not None:
            _check_shapes(found, wanted, task, card, report)
        return found
    report(
        IncompatibleAdapter(
            f"tensor {show(min(found))} belongs to no head that a {task.kind} has: the file holds "
            f"{len(found)} tensors of whole modules, and none but a classifier (and its pooler) is kept"
        )
    )
    return {}


def names_of_heads(found: Collection[str], declared: Collection[str]) -> tuple[str, ...]:
    """Return those of the configuration's ``modules_to_save`` that have tensors, sorted."""
    held = [n for n in declared if any(t.startswith(f"{PREFIX}{n}.") for t in found)]
    return tuple(sorted(held))


def _is_pooler(name: str) -> bool:
    return re.fullmatch(rf"{re.escape(PREFIX)}(?:\w+\.)?pooler\.dense\.weight", name) is not None


def _check_shapes(
    found: Mapping[str, TensorInfo],
    wanted: Mapping[str, str],
    task: Task,
    card: BaseCard,
    report: Report,
) -> None:
    sizes = {"n": len(task.labels), "h": card.hidden_size}
    for name, letters in wanted.items():
        shape = tuple(sizes[letter] for letter in letters)
        if found[name].shape != shape:
            report(
                IncompatibleAdapter(
                    f"tensor {name} has shape {list(found[name].shape)}, and {list(shape)} is needed: "
                    f"the task has {sizes['n']} labels, and base '{card.name}' a hidden size of "
                    f"{sizes['h']}"
                )
            )
