"""Keep the state of a run in files that hold nothing but data: safetensors and JSON, never pickles.

A *tree* is what ``state_dict()`` of an optimizer, a schedule or a generator returns: dicts, lists and
tuples of numbers, text and tensors. Its tensors go to ``NAME.safetensors``, the rest to ``NAME.json``, in
which ``{"tensor": 3}`` stands for the fourth of them. Reading such a file runs no code, whoever wrote it.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorary.errors import CorruptArtifact

if TYPE_CHECKING:
    from pathlib import Path


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """Write ``NAME.safetensors`` and ``NAME.json``; what is read back is equal bit for bit.

    Raises:
        TypeError: the tree holds something that is not data.
        OSError: a file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    plain = _to_plain(tree, tensors)
    (folder / f"{name}.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")
    try:
        save_file(tensors, folder / f"{name}.safetensors")
    except SafetensorError as error:  # its way to say that the system could not write
        raise OSError(str(error)) from error


def read_tree(folder: Path, name: str) -> Any:
    """Read what ``write_tree`` wrote; tensors come to the CPU.

    Raises:
        CorruptArtifact: a file is missing or is not of this form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        plain = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return _from_plain(plain, load_file(folder / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptArtifact(f"'{folder / name}' holds no readable state: {error}.") from error


def generator_state(device: str) -> dict[str, Any]:
    """Return the state of every generator that training may draw from: Python, NumPy, torch, CUDA."""
    legacy: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = legacy
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.random.get_rng_state(),
    }
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generators(state: dict[str, Any], device: str) -> None:
    """Put every generator back to where ``generator_state`` found it."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.random.set_rng_state(state["torch"])
    if device.startswith("cuda") and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _to_plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return ``value`` as JSON knows it, and move its tensors into ``tensors``."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        found = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory; to copy all of them would double a run's memory.
        address = found.untyped_storage().data_ptr()
        is_shared = any(address == one.untyped_storage().data_ptr() for one in tensors.values())
        tensors[name] = found.clone() if is_shared else found
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_to_plain(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_plain(item, tensors) for item in value]}
    if isinstance(value, dict):
        # Keys may be numbers, which JSON would turn into text.
        return {"dict": [[_to_plain(k, tensors), _to_plain(v, tensors)] for k, v in value.items()]}
    raise TypeError(f"a {type(value).__name__} is not data: {value!r}")


def _from_plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo ``_to_plain``."""
    if isinstance(value, list):
        return [_from_plain(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_from_plain(item, tensors) for item in inner)
    if kind == "dict":
        return {_from_plain(k, tensors): _from_plain(v, tensors) for k, v in inner}
    raise ValueError(f"'{kind}' is no kind of value")
