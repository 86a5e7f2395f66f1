"""Rewrite a validated adapter in the one form that every version is stored in, and name its content.

The form is plain LoRA: each module's scale is folded into B, so ``lora_alpha == r`` and the factor on
B·A is 1 everywhere. Servers that ignore ``alpha_pattern`` or rsLoRA then compute the same as PEFT.

Semantics: ``B'[m] = scale[m] * B[m]``, ``A'[m] = A[m]``; DoRA's magnitudes stay what they are. B keeps its dtype when every product is
exactly representable in it (powers of two nearly always); otherwise B' is float32, rounded once.

The digest is a sha256 over the canonical configuration and tensors, the base's fingerprint and the task
(the template and the labels are part of what a caller gets). It is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lorary.registry.base import BaseCard
from lorary.registry.folder import CONFIG_FILE, TENSORS_FILE, AdapterFolder
from lorary.registry.folding import fold
from lorary.registry.layouts import AdapterSpec
from lorary.registry.manifest import Manifest, Task
from lorary.registry.safetensors_file import (
    NUMPY_DTYPES,
    Array,
    read_header,
    read_tensor,
)
from lorary.registry.safetensors_file import write as write_safetensors
from lorary.registry.tensor_layout import lora_key

_METADATA: Final = {"format": "pt"}
_IDENTITY_VERSION: Final = 1


def write_canonical(files: AdapterFolder, spec: AdapterSpec, card: BaseCard, dest: Path) -> float:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of the canonical form.

    Args:
        files: the validated folder.
        spec: what validation found.
        card: its base.
        dest: an existing folder; the two files are new in it and synced to disk.

    Returns:
        The largest ‖B' − scale·B‖ / ‖scale·B‖ of a module: 0 where every product was exact.

    Raises:
        IncompatibleAdapter: a folded value is beyond float32.
        OSError: the files cannot be written.
    """
    config = json.dumps(canonical_config(spec, card), indent=2, sort_keys=True) + "\n"
    with (dest / CONFIG_FILE).open("xb") as file:
        file.write(config.encode())
        file.flush()
        os.fsync(file.fileno())
    source = files.tensors
    infos = read_header(source).tensors
    scales = {lora_key(m, "B"): lora.scale for m, lora in spec.modules.items() if lora.scale != 1.0}

    worst = 0.0

    def load(name: str) -> Array:
        nonlocal worst
        array = read_tensor(source, infos[name])
        if name not in scales:
            return array
        folded, error = fold(name, array, scales[name])
        worst = max(worst, error)
        return folded

    layout = {
        # Float32 stays float32; what half precision becomes, only the products tell.
        name: (
            load(name).dtype
            if name in scales and info.dtype != "F32"
            else NUMPY_DTYPES[info.dtype],
            info.shape,
        )
        for name, info in infos.items()
    }
    with (dest / TENSORS_FILE).open("xb") as file:
        write_safetensors(file, layout, load, _METADATA)
        file.flush()
        os.fsync(file.fileno())
    return worst


def canonical_config(spec: AdapterSpec, card: BaseCard) -> dict[str, Any]:
    """Return the minimal configuration that PEFT, vLLM and LoRAX read alike."""
    patterned = {m: lora.rank for m, lora in spec.modules.items() if lora.rank != spec.rank}
    # Named only where there is one, so that digests of always active adapters stay what they were.
    tokens = spec.config.invocation_tokens
    invocation = {"alora_invocation_tokens": list(tokens)} if tokens else {}
    return {
        **invocation,
        "alpha_pattern": patterned,
        "base_model_name_or_path": _base_name(spec, card),
        "bias": "none",
        "fan_in_fan_out": spec.config.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": spec.rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(spec.heads) or None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": patterned,
        "revision": spec.config.revision,
        "target_modules": target_modules(spec.modules, card),
        "task_type": spec.config.task_type,
        "use_dora": spec.magnitudes,
        "use_rslora": False,
    }


def _base_name(spec: AdapterSpec, card: BaseCard) -> str:
    """Return the base's public id; a folder of the training machine means nothing elsewhere."""
    name = spec.config.base_model_name_or_path
    return name if name and not name.startswith(("/", ".", "~")) else card.name


def target_modules(modules: Mapping[str, Any], card: BaseCard) -> list[str]:
    """Return last names (``q_proj``) when they mean exactly ``modules`` in this base, else full names."""
    lasts = {module.rpartition(".")[2] for module in modules}
    meant = {module for module in card.modules if module.rpartition(".")[2] in lasts}
    return sorted(lasts if meant == set(modules) else modules)


def content_digest(
    *,
    base_fingerprint: str,
    task: Task,
    config: str,
    tensors: str,
    tasks: Mapping[str, Task] | None = None,
) -> str:
    """Return the identity of a version's content.

    Args:
        base_fingerprint: of the base that the adapter belongs to.
        task: how text becomes a prompt, and what answers mean.
        config: hex sha256 of the canonical ``adapter_config.json``.
        tensors: hex sha256 of the canonical ``adapter_model.safetensors``.
        tasks: of an adapter for several tasks, all of them by name.
    """
    identity: dict[str, Any] = {
        "identity_version": _IDENTITY_VERSION,
        "base": base_fingerprint,
        "task": dataclasses.asdict(task),
        CONFIG_FILE: config,
        TENSORS_FILE: tensors,
    }
    if tasks:
        identity["tasks"] = {name: dataclasses.asdict(one) for name, one in tasks.items()}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"


def digest_of(manifest: Manifest) -> str:
    """Return the identity of the content that a manifest lists, whatever digest it names."""
    sha256s = {entry.path: entry.sha256 for entry in manifest.files}
    return content_digest(
        base_fingerprint=manifest.base.fingerprint,
        task=manifest.task,
        config=sha256s.get(CONFIG_FILE, ""),
        tensors=sha256s.get(TENSORS_FILE, ""),
        tasks=manifest.tasks,
    )
