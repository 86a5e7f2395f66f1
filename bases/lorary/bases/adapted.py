"""A base with an adapter, by PEFT: what it answers, and the whole model that it makes when merged."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from lorary.bases.load import quiet_bitsandbytes
from lorary.errors import CorruptArtifact, MissingDependency
from lorary.registry.tokenizer_files import TOKENIZER_FILES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

_PROBES: Final = 4
_PROBE_TOKENS: Final = 32
REPORT_FILE: Final = "merge-report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How far the logits of two models are apart, on the same prompts, in float32.

    Attributes:
        max_logit: the largest difference of a logit.
        top_1: the fraction of positions whose most likely token is the same.
        adapter_effect: the largest difference that the adapter makes to the bare base: what the others
            are small against.
        num_positions: how many positions were compared.
    """

    max_logit: float
    top_1: float
    adapter_effect: float
    num_positions: int


def compare_adapters(base: Path, first: Path, second: Path) -> Deviation:
    """Load two adapters of one base with PEFT, in float32, and compare what they answer.

    Args:
        base: folder of the base.
        first: PEFT folder; checked before, because PEFT lets some adapters change the base.
        second: another one.

    Raises:
        MissingDependency: torch, transformers or peft are not installed.
        CorruptArtifact: PEFT cannot read an adapter.
    """
    tokens = _probes(base, first)
    bare = _logits(_load_base(base), tokens)
    wanted = _logits(_attach(base, first), tokens)
    return _deviation(wanted, _logits(_attach(base, second), tokens), bare)


def merge_adapter(base: Path, adapter: Path, dest: Path, *, dtype: str = "bfloat16") -> Deviation:
    """Write base and adapter as one model of 16-bit weights, and say how far it is from the adapter.

    The sum is formed in float32 and rounded once. The comparison is between the base with the adapter
    beside it, in float32, and the rounded weights, also computed in float32: what merging itself costs.

    Args:
        base: folder of the base, unquantized.
        adapter: PEFT folder, checked before; LoRA or DoRA.
        dest: a new folder: the model, its tokenizer and ``merge-report.json``.
        dtype: ``bfloat16`` or ``float16``.

    Raises:
        MissingDependency: torch, transformers or peft are not installed.
        CorruptArtifact: the merged weights are not finite in ``dtype``.
        OSError: ``dest`` cannot be written.
    """
    tokens = _probes(base, adapter)
    bare = _logits(_load_base(base), tokens)
    model = _attach(base, adapter)
    wanted = _logits(model, tokens)
    merged = model.merge_and_unload()
    del model
    import torch

    rounded = merged.to(getattr(torch, dtype))
    if not all(bool(parameter.isfinite().all()) for parameter in rounded.parameters()):
        raise CorruptArtifact(f"the merged weights do not fit {dtype}; merge to bfloat16")
    rounded.save_pretrained(dest)
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, dest / name)
    found = _deviation(wanted, _logits(rounded.float(), tokens), bare)
    report = {"dtype": dtype, **asdict(found)}
    (dest / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    return found


def _probes(base: Path, adapter: Path) -> torch.Tensor:
    """Return token ids that are the same on every machine, spread over the vocabulary.

    An aLoRA's invocation stands in the middle of each; without it PEFT would leave the adapter off.
    """
    _need("transformers")
    import numpy as np
    import torch

    config = json.loads((base / "config.json").read_text())
    vocab = config.get("text_config", config)["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab, (_PROBES, _PROBE_TOKENS))
    config = json.loads((adapter / "adapter_config.json").read_text())
    tokens = np.array(config.get("alora_invocation_tokens") or [], dtype=ids.dtype)
    middle = np.broadcast_to(tokens, (_PROBES, len(tokens)))
    front, back = np.hsplit(ids, 2)
    return torch.from_numpy(np.hstack([front, middle, back]))


def _load_base(base: Path) -> Any:
    quiet_bitsandbytes()
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model.eval()


def _attach(base: Path, adapter: Path) -> Any:
    _need("peft")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(_load_base(base), str(adapter)).eval()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptArtifact(f"PEFT cannot load {adapter}: {error}") from error


def _logits(model: Any, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
    import torch

    with torch.inference_mode():
        return [model(input_ids=row[None]).logits[0].float() for row in tokens]


def _deviation(
    wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], bare: Sequence[torch.Tensor]
) -> Deviation:
    pairs = list(zip(wanted, found, strict=True))
    same = sum(int((w.argmax(-1) == f.argmax(-1)).sum()) for w, f in pairs)
    positions = sum(len(w) for w in wanted)
    return Deviation(
        max_logit=max(float((w - f).abs().max()) for w, f in pairs),
        top_1=same / positions,
        adapter_effect=max(float((w - b).abs().max()) for w, b in zip(wanted, bare, strict=True)),
        num_positions=positions,
    )


def _need(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(
            f"this loads a model with {package}, which is not installed: pip install 'lorary[train]'"
        ) from error
