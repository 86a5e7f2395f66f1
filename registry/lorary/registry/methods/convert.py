"""Write an adapter of another method as a LoRA of the same change, and measure what rounding cost.

1. The configuration is read as LoRA's, with the method's own keys taken out (``adapter_config`` checks
   the rest as always).
2. Every tensor must be one that the method calls for, in the shape that the base calls for; nothing is
   computed before.
3. B and A are computed in double precision and stored in the dtype of the original where that holds
   them exactly, else in float32. A rank above the module's width is brought down to it, exactly.
4. The result is an ordinary PEFT folder, which is validated like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.adapter_config import AdapterConfig, parse_config
from lorary.registry.base import BaseCard
from lorary.registry.folder import CONFIG_FILE, TENSORS_FILE, AdapterFolder, read_bytes
from lorary.registry.manifest import Conversion
from lorary.registry.methods.adalora import AdaLora
from lorary.registry.methods.loha import Loha
from lorary.registry.methods.method import Method, Module, Wide, one_sided, plain_keys
from lorary.registry.methods.miss import Miss
from lorary.registry.methods.vera import Vera
from lorary.registry.safetensors_file import (
    NUMPY_DTYPES,
    Array,
    TensorInfo,
    read_header,
    read_tensor,
    write,
)
from lorary.registry.strict_json import parse_json, show
from lorary.registry.tensor_layout import PREFIX, lora_key
from lorary.registry.validate import MAX_RANK
from lorary.registry.values import product_norm

METHODS: Final[Mapping[str, Method]] = {
    method.peft_type: method for method in (AdaLora(), Loha(), Miss(), Vera())
}
_MAX_OWN_RANK: Final = 4096
# Of these the change has full rank, or is none: no LoRA computes the same.
NO_LORA: Final = {
    "IA3": "it scales activations, which changes the weights in full rank",
    "LN_TUNING": "it trains the norms of the base, which all adapters share",
    "OFT": "it rotates the weights, which changes them in full rank",
    "BOFT": "it rotates the weights, which changes them in full rank",
    "HRA": "it reflects the weights, which changes them in full rank",
    "PROMPT_TUNING": "it trains a prompt and no weights",
    "P_TUNING": "it trains a prompt and no weights",
    "PREFIX_TUNING": "it trains keys and values and no weights",
    "FOURIERFT": "its change has full rank; only an approximation is a LoRA",
    "SHIRA": "its change is sparse and of full rank",
}


def method_of(files: AdapterFolder) -> Method | None:
    """Return the method that ``files`` need to be converted from; ``None`` if they are LoRA, or unknown.

    Raises:
        CorruptArtifact: the configuration is no JSON.
        IncompatibleAdapter: a method that no LoRA can stand in for.
    """
    kind = parse_json(read_bytes(files.config), CONFIG_FILE).get("peft_type")
    if not isinstance(kind, str):
        return None
    if kind in NO_LORA:
        raise IncompatibleAdapter(
            f"adapter_config.json has peft_type '{kind}', which is no LoRA: {NO_LORA[kind]}. Merge it "
            "into a base of its own, or train a LoRA"
        )
    return METHODS.get(kind)


def convert(method: Method, files: AdapterFolder, card: BaseCard, dest: Path) -> Conversion:
    """Write the LoRA that computes what an adapter of ``method`` computes.

    Args:
        method: of the adapter.
        files: the adapter's folder, its file list checked.
        card: its base.
        dest: an empty folder; gets ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        From what, and with which error.

    Raises:
        CorruptArtifact: tensors are missing, or contradict the configuration.
        IncompatibleAdapter: another base, a variant that is no LoRA, or a rank beyond the limit.
        OSError: ``dest`` cannot be written.
    """
    raw = parse_json(read_bytes(files.config), CONFIG_FILE)
    plain = {key: value for key, value in raw.items() if key not in method.own_keys}
    plain |= {"peft_type": "LORA", **method.plain_config(raw)}
    config = parse_config(json.dumps(plain).encode(), max_rank=_MAX_OWN_RANK)
    tensors = read_header(files.tensors).tensors
    modules = _modules(method, raw, config, tensors, card)
    reader = _Reader(method, raw, files.tensors, tensors)
    layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    ranks: dict[str, int] = {}
    worst = 0.0
    for module in modules:
        b, a, error = reader.rounded(module)
        layout |= {
            lora_key(module.name, "A"): (a.dtype, a.shape),
            lora_key(module.name, "B"): (b.dtype, b.shape),
        }
        ranks[module.name] = a.shape[0]
        worst = max(worst, error)
    _write_config(config, ranks, dest)
    sources = {lora_key(m.name, side): (m, side) for m in modules for side in "AB"}

    def load(name: str) -> Array:
        module, side = sources[name]
        b, a, _ = reader.rounded(module)
        return a if side == "A" else b

    with (dest / TENSORS_FILE).open("xb") as file:
        write(file, layout, load, {"format": "pt"})
    return Conversion(source=method.peft_type, max_error=worst)


@dataclass(frozen=True, slots=True)
class _Reader:
    method: Method
    config: Mapping[str, Any]
    path: Path
    tensors: Mapping[str, TensorInfo]

    def rounded(self, module: Module) -> tuple[Array, Array, float]:
        """Return B and A as stored, and ‖BA − ΔW‖ / ‖ΔW‖."""
        names = {name: name for name in self.method.shared}
        names |= {
            last: f"{PREFIX}{module.name}.{last}"
            for last in self.method.shapes(module, self.config)
        }
        parts = {
            last: read_tensor(self.path, self.tensors[name]).astype(np.float64)
            for last, name in names.items()
        }
        dtype = NUMPY_DTYPES[self.tensors[names[next(reversed(names))]].dtype]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            b, a = self.method.product(module, parts, self.config)
            if a.shape[0] > min(module.out_features, module.in_features):
                b, a = one_sided(b @ a)
            stored_b, stored_a = _stored(b, dtype), _stored(a, dtype)
            return stored_b, stored_a, _error(b, a, stored_b, stored_a)


def _modules(
    method: Method,
    raw: Mapping[str, Any],
    config: AdapterConfig,
    tensors: Mapping[str, TensorInfo],
    card: BaseCard,
) -> list[Module]:
    """Return the modules that are changed; every tensor is accounted for, in its shape."""
    targeted = sorted(config.targets(card.modules.keys()))
    if not targeted:
        raise CorruptArtifact(f"adapter_config.json targets no linear module of base '{card.name}'")
    ranks = config.ranks(targeted)
    scales = config.scales(ranks)
    modules = [Module(name, *card.modules[name], ranks[name], scales[name]) for name in targeted]
    left = dict(tensors)
    for module in modules:
        rank = min(method.lora_rank(module.rank), module.out_features, module.in_features)
        if rank > MAX_RANK:
            raise IncompatibleAdapter(
                f"module {module.name}: this {method.peft_type} of rank {module.rank} is a LoRA of rank "
                f"{rank}; the limit is {MAX_RANK}. Train it with a smaller rank"
            )
        for last, wanted in method.shapes(module, raw).items():
            info = _take(left, f"{PREFIX}{module.name}.{last}")
            if info.shape != wanted:
                raise IncompatibleAdapter(
                    f"tensor {info.name} has shape {list(info.shape)}, and {list(wanted)} is needed for "
                    f"rank {module.rank} in base '{card.name}'"
                )
    for name in method.shared:
        info = _take(left, name)
        if problem := method.shared_problem(name, info.shape, modules):
            raise IncompatibleAdapter(f"tensor {name} has shape {list(info.shape)}, and {problem}")
    if left:
        raise IncompatibleAdapter(
            f"{TENSORS_FILE} holds tensor {show(next(iter(left)))}, which no module that "
            f"adapter_config.json targets in base '{card.name}' needs; loading it could change the base"
        )
    return modules


def _take(left: dict[str, TensorInfo], name: str) -> TensorInfo:
    if name not in left:
        raise CorruptArtifact(
            f"{TENSORS_FILE} lacks tensor {name}, which adapter_config.json calls for"
        )
    return left.pop(name)


def _stored(values: Wide, dtype: np.dtype[Any]) -> Array:
    """Return ``values`` in ``dtype`` if it holds them exactly, else rounded to float32."""
    narrow: Array = values.astype(dtype)
    exact = dtype != np.float32 and np.array_equal(narrow.astype(np.float64), values)
    return narrow if exact else values.astype(np.float32)


def _error(b: Wide, a: Wide, stored_b: Array, stored_a: Array) -> float:
    """Return ‖B'A' − BA‖ / ‖BA‖.

    Semantics: ``B'A' − BA = (B' − B) A' + B (A' − A)``, a product of rank 2k, whose norm needs no
    more than its factors.
    """
    size = product_norm(b, a)
    if not size:
        return 0.0
    wide_b, wide_a = stored_b.astype(np.float64), stored_a.astype(np.float64)
    lost = product_norm(np.hstack([wide_b - b, b]), np.vstack([wide_a, wide_a - a]))
    return lost / size


def _write_config(config: AdapterConfig, ranks: Mapping[str, int], dest: Path) -> None:
    rank = max(ranks.values())
    pattern = {name: found for name, found in ranks.items() if found != rank}
    plain = {
        **plain_keys(config),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    (dest / CONFIG_FILE).write_text(json.dumps(plain))
