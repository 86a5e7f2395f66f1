"""Well-formed weights with wrong names, shapes or values: what lenient loaders take in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.poison.attack import RANK, Attack, Tensors, Victim, corrupt, misfit
from lorary.registry.tensor_layout import lora_key, magnitude_key

_Edit = Callable[[Victim, Tensors], None]


def _edited(edit: _Edit) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        tensors = victim.honest_tensors()
        edit(victim, tensors)
        victim.set_tensors(tensors)

    return change


def _first(victim: Victim, side: str) -> str:
    return lora_key(victim.modules[0], side)


def _value(value: float, side: str = "B") -> Callable[[Victim], None]:
    """Write one value into the last matrix of a side."""

    def edit(victim: Victim, tensors: Tensors) -> None:
        tensors[lora_key(victim.modules[-1], side)][-1, -1] = value

    return _edited(edit)


def _half_nan(victim: Victim, tensors: Tensors) -> None:
    key = _first(victim, "A")
    tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)
    tensors[key][0, 0] = np.nan


def _zero(side: str) -> Callable[[Victim], None]:
    def edit(victim: Victim, tensors: Tensors) -> None:
        for module in victim.modules:
            tensors[lora_key(module, side)][:] = 0

    return _edited(edit)


def _louder(factor: float) -> Callable[[Victim], None]:
    def edit(victim: Victim, tensors: Tensors) -> None:
        tensors[_first(victim, "B")] *= np.float32(factor)

    return _edited(edit)


def _with(name: str, shape: tuple[int, ...] = (RANK, 64)) -> Callable[[Victim], None]:
    """Add a tensor; ``{module}`` and ``{layer}`` stand for the first module and its layer."""

    def edit(victim: Victim, tensors: Tensors) -> None:
        module = victim.modules[0]
        layer = module.rpartition(".")[0]
        tensors[name.format(module=module, layer=layer)] = np.ones(shape, np.float32)

    return _edited(edit)


def _base_weight(victim: Victim, tensors: Tensors) -> None:
    module = victim.modules[0]
    weight = np.zeros(victim.card.modules[module], np.float32)
    tensors[f"base_model.model.{module}.base_layer.weight"] = weight


def _renamed(victim: Victim, tensors: Tensors) -> None:
    for key in [*tensors]:
        tensors[key.replace("base_model.model.", "model.")] = tensors.pop(key)


def _half_the_layers(victim: Victim, tensors: Tensors) -> None:
    for module in victim.modules[len(victim.modules) // 2 :]:
        for side in "AB":
            del tensors[lora_key(module, side)]


def _without_b(victim: Victim, tensors: Tensors) -> None:
    del tensors[_first(victim, "B")]


def _undeclared(victim: Victim, tensors: Tensors) -> None:
    other = next(m for m in sorted(victim.card.modules) if m not in victim.modules)
    rows, columns = victim.card.modules[other]
    tensors[lora_key(other, "A")] = np.full((RANK, columns), 1e-3, np.float32)
    tensors[lora_key(other, "B")] = np.full((rows, RANK), 1e-3, np.float32)


def _transposed(victim: Victim, tensors: Tensors) -> None:
    key = _first(victim, "A")
    tensors[key] = np.ascontiguousarray(tensors[key].T)


def _swapped(victim: Victim, tensors: Tensors) -> None:
    a, b = _first(victim, "A"), _first(victim, "B")
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _reranked(rank_a: int, rank_b: int) -> Callable[[Victim], None]:
    def edit(victim: Victim, tensors: Tensors) -> None:
        rows, columns = victim.card.modules[victim.modules[0]]
        tensors[_first(victim, "A")] = np.full((rank_a, columns), 1e-3, np.float32)
        tensors[_first(victim, "B")] = np.full((rows, rank_b), 1e-3, np.float32)

    return _edited(edit)


def _of_another_width(victim: Victim, tensors: Tensors) -> None:
    for module in victim.modules:
        key = lora_key(module, "A")
        tensors[key] = np.ascontiguousarray(tensors[key][:, ::2])


def _flat(victim: Victim, tensors: Tensors) -> None:
    key = _first(victim, "A")
    tensors[key] = tensors[key].reshape(-1)


def _magnitude(victim: Victim, tensors: Tensors) -> None:
    rows = victim.card.modules[victim.modules[0]][0]
    tensors[magnitude_key(victim.modules[0])] = np.ones(rows, np.float32)


def _layer_999(victim: Victim, tensors: Tensors) -> None:
    beyond = ".".join("999" if part.isdigit() else part for part in victim.modules[0].split("."))
    for side in "AB":
        tensors[lora_key(beyond, side)] = tensors[_first(victim, side)]


def _of_rank_1024(victim: Victim) -> None:
    tensors: Tensors = {}
    for module in victim.modules:
        rows, columns = victim.card.modules[module]
        tensors[lora_key(module, "A")] = np.full((1024, columns), 1e-6, np.float32)
        tensors[lora_key(module, "B")] = np.full((rows, 1024), 1e-6, np.float32)
    victim.set_tensors(tensors)
    victim.set_config(r=1024, lora_alpha=1024)


def _keys(name: str, what: str, says: str, edit: _Edit, *, is_corrupt: bool = False) -> Attack:
    error: Any = CorruptArtifact if is_corrupt else IncompatibleAdapter
    return Attack(name=name, kind="keys", what=what, says=says, change=_edited(edit), error=error)


_OVERWRITES: Final = "could overwrite the base"

ATTACKS: Final[tuple[Attack, ...]] = (
    corrupt("values", "nan", "One NaN; every answer becomes NaN.", "NaN or infinite", _value(np.nan)),
    corrupt("values", "infinity", "One infinity.", "NaN or infinite", _value(np.inf, "A")),
    corrupt("values", "negative-infinity", "One negative infinity.", "NaN or infinite", _value(-np.inf)),
    corrupt("values", "nan-in-bfloat16", "A NaN in half precision.", "NaN or infinite", _edited(_half_nan)),
    misfit("values", "zero-b", "B of zeros everywhere: it is listed, billed and does nothing.",
           "no effect", _zero("B")),
    misfit("values", "zero-a", "A of zeros everywhere.", "no effect", _zero("A")),
    misfit("values", "a-change-of-100-weights", "A change a hundred times as large as its weight.",
           "times as large", _louder(1000)),
    misfit("values", "values-of-1e30", "Finite values whose product is not.", "times as large", _louder(1e30)),
    misfit("keys", "overwrites-the-last-norm", "PEFT copies it into the resident base, for every adapter.",
           _OVERWRITES, _with("base_model.model.model.norm.weight", (64,))),
    misfit("keys", "overwrites-the-head", "The base's output head under its own name.",
           _OVERWRITES, _with("base_model.model.lm_head.weight")),
    misfit("keys", "overwrites-the-token-table", "The base's token table under its own name.",
           _OVERWRITES, _with("base_model.model.model.embed_tokens.weight")),
    misfit("keys", "overwrites-a-linear-layer", "A whole linear layer of the base under its own name.",
           _OVERWRITES, _with("base_model.model.{module}.weight")),
    _keys("overwrites-a-wrapped-layer", "The weight below a LoRA layer, as PEFT names it.",
          _OVERWRITES, _base_weight),
    misfit("keys", "overwrites-the-embedding-below", "What save_pretrained adds when embeddings are targeted.",
           _OVERWRITES, _with("base_model.model.model.embed_tokens.base_layer.weight")),
    misfit("keys", "adapts-the-token-table", "LoRA on the token table that all adapters share.",
           "token table", _with("base_model.model.model.embed_tokens.lora_embedding_A")),
    misfit("keys", "new-token-rows", "Replaced rows of the token table.", "token table",
           _with("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta")),
    misfit("keys", "adapts-the-head", "LoRA on the output head, undeclared.",
           "head", _with("base_model.model.lm_head.lora_A.weight")),
    misfit("keys", "vera-projection", "The shared matrix of another method.",
           "VeRA", _with("base_model.vera_A")),
    misfit("keys", "path-as-a-tensor-name", "A name that is a path, for loaders that write tensors to files.",
           "no LoRA matrix", _with("../../../../etc/passwd")),
    misfit("keys", "path-as-a-module", "A path inside a well-formed name.",
           "does not have", _with("base_model.model.../../etc/passwd.lora_A.weight")),
    misfit("keys", "attribute-as-a-module", "A name that walks Python attributes.",
           "does not have", _with("base_model.model.__class__.__init__.lora_A.weight")),
    _keys("undeclared-magnitudes", "DoRA's vectors without use_dora.", "does not say use_dora", _magnitude),
    _keys("layer-999", "A layer that the base does not have.", "does not have", _layer_999),
    _keys("renamed-tensors", "All names without their prefix; loaders warn, and apply nothing.",
          "no LoRA matrix", _renamed),
    _keys("half-of-the-layers", "Half of the layers are missing; loaders leave them as they were.",
          "lacks", _half_the_layers, is_corrupt=True),
    _keys("a-without-b", "A module with A alone.", "go together", _without_b, is_corrupt=True),
    _keys("undeclared-module", "A module that the configuration does not name.",
          "does not target", _undeclared, is_corrupt=True),
    _keys("transposed", "A matrix on its side.", "has shape", _transposed),
    _keys("swapped", "A under B's name and B under A's.", "has shape", _swapped),
    _keys("flat", "A matrix as one row of numbers.", "has shape", _flat),
    _keys("of-another-base", "Shapes of a base half as wide.", "has shape", _of_another_width),
    Attack(name="rank-not-as-configured", kind="keys", what="Tensors of rank 8, a configuration of rank 4.",
           says="rank 4", change=_reranked(8, 8)),
    Attack(name="two-ranks", kind="keys", what="A and B of different ranks.",
           says="rank 4", change=_reranked(RANK, 8)),
    misfit("config", "rank-1024", "A rank that fills a server's memory.", "1 to 512", _of_rank_1024),
)  # fmt: skip
