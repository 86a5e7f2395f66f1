"""Write what a run made: a standard PEFT folder, ``manifest.json`` and ``report/``, all at once.

sentiment/
    adapter_config.json  adapter_model.safetensors  manifest.json
    report/loss_curve.png  report/metrics.json  report/examples.jsonl
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.bases.load import load_model
from lorary.errors import AlreadyExists, StorageError
from lorary.registry.manifest import BaseIdentity, GoldenProbe, Manifest
from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lorary.bases import Base
    from lorary.registry.manifest import Metrics
    from lorary.trainer.train import Prepared

NUM_TOP_LOGITS = 16
_PACKAGES = (
    *("lorary", "torch", "transformers", "peft", "accelerate", "bitsandbytes"),
    *("tokenizers", "safetensors", "numpy"),
)


def check_output(folder: Path, *, force: bool) -> None:
    """Refuse, before any work, an output that exists or cannot be made.

    Raises:
        AlreadyExists: it exists and ``force`` is not set.
        StorageError: its parent cannot be written.
    """
    if folder.exists() and not force:
        raise AlreadyExists(
            f"'{folder}' exists. Choose another --output, or replace it with --force."
        )
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise AlreadyExists(
            f"'{folder}' exists and is not the output of a training run, so --force does not "
            "replace it. Choose another --output."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise StorageError(
            f"'{folder.parent}' cannot be written: {error.strerror}. Choose another --output."
        ) from error


def write_output(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a folder beside ``folder``, then put it in place; replaces an old one.

    Raises:
        StorageError: the disk is full or read-only; nothing is left behind.
    """
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        draft.chmod(0o755)
        fill(draft)
        if folder.exists():
            old = draft.with_name(f"{draft.name}-old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    except OSError as error:
        raise StorageError(f"cannot write '{folder}': {error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def save_adapter(model: Any, folder: Path, base: Base) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does."""
    config = model.peft_config["default"]
    # A local path would mean nothing on another machine; the manifest has the fingerprint.
    config.base_model_name_or_path = base.name
    # No embeddings are trained, and looking for changed ones would ask the Hub for the base.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled template of a model card
    for path in folder.iterdir():
        path.chmod(0o644)


def golden_probes(
    folder: Path, base: Base, prompts: Sequence[Sequence[int]], *, quantization: Any, device: str
) -> tuple[GoldenProbe, ...]:
    """Load base and saved adapter afresh in float32 and record the largest logits of each prompt.

    Reading the files back proves that what was written is what was trained. No prompts, no probes.
    """
    if not prompts:
        return ()
    probes = []
    read = next_logits(folder, base, prompts, quantization=quantization, device=device)
    for prompt, logits in zip(prompts, read, strict=True):
        top = logits.topk(min(NUM_TOP_LOGITS, len(logits)))
        probes.append(
            GoldenProbe(
                token_ids=tuple(prompt),
                top_token_ids=tuple(top.indices.tolist()),
                top_logits=tuple(round(value, 4) for value in top.values.tolist()),
                dtype="float32",
            )
        )
    return tuple(probes)


def next_logits(
    folder: Path, base: Base, prompts: Sequence[Sequence[int]], *, quantization: Any, device: str
) -> list[Tensor]:
    """Load base and saved adapter afresh in float32; return the logits after each prompt, [vocab]."""
    import peft
    import torch

    model = load_model(base, quantization=quantization, dtype=torch.float32, device=device)
    found = []
    with quiet_libraries():
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
        found.append(logits[0, -1].float())
    return found


def build_manifest(
    run: Prepared,
    *,
    method: Any,
    probes: tuple[GoldenProbe, ...],
    metrics: Metrics,
    training: dict[str, Any],
) -> Manifest:
    """Return the manifest of a finished run; name, version and digest are the registry's to give."""
    recipe, base = run.recipe, run.base
    return Manifest(
        base=BaseIdentity(
            name=base.name,
            fingerprint=base.card.fingerprint,
            architecture=base.card.architecture,
            revision=base.revision,
            quantization=recipe.method.base_quantization,
        ),
        method=method,
        task=run.task,
        tasks=run.tasks,
        metrics=metrics,
        data=run.data_facts(),
        training={
            "recipe": run.recorded(),
            "seed": recipe.training.seed,
            "versions": {name: version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "machine": platform.machine(),
            **training,
        },
        golden_probes=probes,
        created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        description=recipe.description,
    )


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
