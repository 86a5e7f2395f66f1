"""Write a canonical LoRA as the GGUF file that llama.cpp loads with ``--lora``.

llama.cpp scales B·A by ``alpha / rank`` with one alpha for the whole file, and by 1 where alpha is 0; scales
are in B already, so alpha is 0 and every rank and pattern comes out right. Tensors are called after the
weights that they change, ``blk.0.attn_q.weight.lora_a`` [r, in] and ``.lora_b`` [out, r].

An aLoRA's invocation tokens are written too; llama.cpp leaves it off where a prompt lacks them.

Two things differ between the layouts of Hugging Face and llama.cpp: names, for which the ``gguf`` package
has maps, and, in Llama's family, the order of the rows of q and k, because rotary positions take pairs
(2i, 2i+1) there and (i, i + half) here. B's rows are put in the same order.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lorary.errors import CorruptArtifact, IncompatibleAdapter, MissingDependency
from lorary.registry.base import BaseCard
from lorary.registry.folder import AdapterFolder, read_bytes
from lorary.registry.layouts import AdapterSpec
from lorary.registry.safetensors_file import Array, read_header, read_tensor
from lorary.registry.strict_json import parse_json
from lorary.registry.tensor_layout import lora_key

ALPHA: Final = 0.0
"""llama.cpp's word for: the scale is in the matrices."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What llama.cpp calls an architecture, and whether it reorders q and k."""

    name: str
    permutes: bool = False


FAMILIES: Final[Mapping[str, _Family]] = {
    "LlamaForCausalLM": _Family("llama", permutes=True),
    "MistralForCausalLM": _Family("llama", permutes=True),
    "Qwen2ForCausalLM": _Family("qwen2"),
    "Qwen3ForCausalLM": _Family("qwen3"),
    "GemmaForCausalLM": _Family("gemma"),
    "Gemma2ForCausalLM": _Family("gemma2"),
    "Gemma3ForCausalLM": _Family("gemma3"),
    "GraniteForCausalLM": _Family("granite", permutes=True),
    "Olmo2ForCausalLM": _Family("olmo2"),
    "Phi3ForCausalLM": _Family("phi3"),
}
"""Those for which the tensors were compared with those of llama.cpp's own converter, and are the same."""

_QUERY_OR_KEY: Final = re.compile(r".*\.(q|k)_proj")


def write_gguf(
    files: AdapterFolder, spec: AdapterSpec, card: BaseCard, base: Path, dest: Path, *, name: str
) -> None:
    """Write an adapter as GGUF.

    Args:
        files: a canonical version.
        spec: what validation found.
        card: its base.
        base: the base's folder, for the number of heads.
        dest: the file to be written.
        name: for the file's metadata.

    Raises:
        MissingDependency: the ``gguf`` package is not installed.
        IncompatibleAdapter: an architecture whose layout is not known here, or a module that llama.cpp
            does not have.
        OSError: ``dest`` cannot be written.
    """
    gguf = _gguf()
    family = FAMILIES.get(card.architecture)
    if family is None:
        raise IncompatibleAdapter(
            f"base '{card.name}' is a {card.architecture}, whose layout in llama.cpp is not known here; "
            f"known are {', '.join(FAMILIES)}. Export it --to merged and convert that model"
        )
    heads = _heads(base) if family.permutes else {}
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.name)
    names = gguf.get_tensor_name_map(arch, card.num_layers)
    infos = read_header(files.tensors).tensors
    writer = gguf.GGUFWriter(dest, family.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
        if spec.config.invocation_tokens:
            writer.add_array(
                gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(spec.config.invocation_tokens)
            )
        for module, lora in spec.modules.items():
            target = names.get_name(module)
            if target is None:
                raise IncompatibleAdapter(
                    f"llama.cpp's {family.name} has nothing for module {module}; train without it"
                )
            a = read_tensor(files.tensors, infos[lora_key(module, "A")])
            b = read_tensor(files.tensors, infos[lora_key(module, "B")])
            if lora.scale != 1.0:
                raise CorruptArtifact(
                    f"module {module} is not canonical: its scale is {lora.scale}"
                )
            if match := _QUERY_OR_KEY.fullmatch(module) if heads else None:
                b = to_pairs(b, heads[match[1]])
            writer.add_tensor(f"{target}.weight.lora_a", _plain(a))
            writer.add_tensor(f"{target}.weight.lora_b", _plain(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def to_pairs(rows: Array, heads: int) -> Array:
    """Reorder the rows of q or k from halves to pairs.

    Semantics: with ``d = len(rows) / heads``, row ``h d + 2 i + j`` becomes what row ``h d + j d/2 + i`` was.
    """
    split = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def _heads(base: Path) -> dict[str, int]:
    config = parse_json(read_bytes(base / "config.json"), f"config.json of {base}")
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads", queries)
    if type(queries) is not int or type(keys) is not int or queries < 1 or keys < 1:
        raise CorruptArtifact(f"config.json of {base} has no number of attention heads")
    return {"q": queries, "k": keys}


def _plain(array: Array) -> Array:
    """Return float16 as it is, and the rest as float32, which holds bfloat16 exactly."""
    return array if array.dtype == np.float16 else array.astype(np.float32)


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingDependency(
            "writing GGUF needs the gguf package: pip install 'lorary[model]'"
        ) from error
