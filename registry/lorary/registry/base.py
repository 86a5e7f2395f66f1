"""What the registry knows about a base model: its identity and the shapes of its linear layers.

A card is read from a folder in Hugging Face layout (``config.json``, ``*.safetensors``, tokenizer
files) without loading the model. Its *fingerprint* is a sha256 over the configuration, the tokenizer
files, the chat template and every weight tensor's dtype, shape and bytes; it does not depend on how
the tensors are spread over shards, nor on their order. The same pass over the weights gives each linear
module's Frobenius norm, which an adapter's change is compared with.

Hashing reads every weight, so the finished card is kept beside them, in ``.lorary-card.json``, and
used again while name, size and modification time of every file that counts are unchanged::

    {"format_version": 1, "stamp": [["config.json", 712, 1763800000000000000], …], "card": {…}}

A kept card that lacks what this Lorary keeps (the norms, once) is computed again. In a folder that
cannot be written the card is computed each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from lorary.errors import BaseNotFound, CorruptArtifact, StorageError
from lorary.registry.safetensors_file import BASE_LIMITS, TensorInfo, read_header
from lorary.registry.strict_json import parse_json, show
from lorary.registry.tokenizer_files import TOKENIZER_FILES

logger = logging.getLogger(__name__)

CARD_FILE: Final = ".lorary-card.json"
_FORMAT_VERSION: Final = 1
# Keys that a re-save changes and that say nothing about the computation.
_VOLATILE_CONFIG: Final = frozenset({"_name_or_path", "transformers_version", "_commit_hash"})
_LINEAR_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_HEAD_NAMES: Final = frozenset({"lm_head", "embed_out", "output"})
# Position and token tables whose names do not contain "embed".
_TABLE_NAMES: Final = frozenset({"wte", "wpe"})
# transformers' Conv1D keeps its weight as [in_features, out_features].
_TRANSPOSED_ARCHITECTURES: Final = frozenset({"GPT2LMHeadModel"})
# Checkpoints of the bare model lack the prefix that the modules of the causal LM have.
_PREFIXES: Final = {"GPT2LMHeadModel": "transformer."}
_CHUNK_BYTES: Final = 4 << 20
_MAX_JSON_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCard:
    """Identity and shapes of a base model.

    Attributes:
        name: what people call it; not compared.
        fingerprint: ``sha256:<hex>``; equal fingerprints mean the same model, tokenizer and template.
        architecture: class name from ``config.json``, such as ``LlamaForCausalLM``.
        hidden_size: width of the residual stream.
        num_layers: number of transformer blocks; of an encoder-decoder, the encoder's.
        vocab_size: rows of the token table.
        modules: linear module name, as in the live model, to ``(out_features, in_features)``; output
            heads and embeddings are not among them.
        head_modules: names of the output head, tied or not.
        norms: linear module name to the Frobenius norm of its stored weight. Block scales of FP8
            checkpoints are not in it, so such a norm is that of the stored numbers.
    """

    name: str
    fingerprint: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    modules: Mapping[str, tuple[int, int]]
    head_modules: tuple[str, ...]
    norms: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, path: Path, name: str | None = None) -> Self:
        """Read the card of the model in ``path``; hashes every weight unless a cached card is fresh.

        Args:
            path: folder with ``config.json`` and safetensors weights.
            name: what to call the base; the folder's name if not given.

        Raises:
            BaseNotFound: there is no such folder, or it holds no safetensors model.
            CorruptArtifact: ``config.json`` or a weight file is not what it claims.
            StorageError: a file cannot be read.
        """
        path = Path(path)
        stamp = _stamp(path)
        card = _read_cached(path, stamp)
        if card is None:
            card = _compute(path)
            _write_cached(path, stamp, card)
        return cls(**{**card, "name": name or path.resolve().name})


class StoredWeight(NamedTuple):
    """Where the weight of a linear module lies in a base's files.

    ``dtype`` is safetensors' name of it; ``is_transposed`` says that it is kept as [in, out].
    """

    file: Path
    key: str
    dtype: str
    is_transposed: bool


def stored_weights(path: Path) -> dict[str, StoredWeight]:
    """Return where each linear module's weight lies, by the module's name in the live model.

    Raises:
        BaseNotFound, CorruptArtifact, StorageError: as ``BaseCard.from_folder``.
    """
    _, text_config, architecture = _config(path)
    tensors = _tensors(path)
    vocab_size = _size(text_config, path, "vocab_size")
    _, sources, _ = _linear_modules(tensors, architecture, vocab_size)
    is_transposed = architecture in _TRANSPOSED_ARCHITECTURES
    found = {}
    for module, key in sources.items():
        file, info = tensors[key]
        found[module] = StoredWeight(file, key, info.dtype, is_transposed)
    return found


def _config(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return ``config.json``, the part of it that is about the text model, and the architecture."""
    config = parse_json(_read(path / "config.json"), f"config.json of {path}")
    text_config = _text_config(config)
    architectures = config.get("architectures")
    if (
        not isinstance(architectures, list)
        or not architectures
        or not isinstance(text_config, dict)
    ):
        raise CorruptArtifact(f"config.json of {path} names no architecture")
    return config, text_config, str(architectures[0])


def _compute(path: Path) -> dict[str, Any]:
    config, text_config, architecture = _config(path)
    tensors = _tensors(path)
    vocab_size = _size(text_config, path, "vocab_size")
    modules, sources, heads = _linear_modules(tensors, architecture, vocab_size)
    if not heads and config.get("tie_word_embeddings", True):
        heads = ("lm_head",)
    weights = _read_weights(tensors, set(sources.values()))
    hashes = {name: [*weight[:3]] for name, weight in weights.items()}
    return {
        "fingerprint": _fingerprint(path, config, hashes),
        "architecture": architecture,
        "hidden_size": _size(text_config, path, "hidden_size", "n_embd", "d_model"),
        "num_layers": _size(
            text_config, path, "num_hidden_layers", "n_layer", "num_layers", "encoder_layers"
        ),
        "vocab_size": vocab_size,
        "modules": modules,
        "head_modules": heads,
        "norms": {module: weights[source].norm for module, source in sources.items()},
    }


def _text_config(config: Mapping[str, Any]) -> Any:
    """Return the part of a configuration that has the sizes; of a pair of models, the encoder's."""
    if config.get("model_type") == "encoder-decoder":
        return config.get("encoder")
    return config.get("text_config", config)


def _size(config: Mapping[str, Any], path: Path, *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    raise CorruptArtifact(f"config.json of {path} has no positive {' or '.join(keys)}")


def _tensors(path: Path) -> dict[str, tuple[Path, TensorInfo]]:
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for file in _weight_files(path):
        for name, info in read_header(file, BASE_LIMITS).tensors.items():
            if name in tensors:
                raise CorruptArtifact(
                    f"tensor {show(name)} is both in {tensors[name][0].name} and in {file.name}"
                )
            tensors[name] = (file, info)
    return tensors


def _linear_modules(
    tensors: Mapping[str, tuple[Path, TensorInfo]], architecture: str, vocab_size: int
) -> tuple[dict[str, tuple[int, int]], dict[str, str], tuple[str, ...]]:
    """Return the linear modules' shapes, the tensor that each is stored in, and the output heads."""
    prefix = _PREFIXES.get(architecture, "")
    modules: dict[str, tuple[int, int]] = {}
    sources: dict[str, str] = {}
    heads: list[str] = []
    for name, (_, info) in sorted(tensors.items()):
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if kind != "weight" or len(info.shape) != 2 or info.dtype not in _LINEAR_DTYPES:
            continue
        if last in _HEAD_NAMES and info.shape[0] == vocab_size:
            heads.append(module)
            continue
        if last in _TABLE_NAMES or "embed" in last or "norm" in last:
            continue
        if prefix and not module.startswith(prefix):
            module = prefix + module
        rows, columns = info.shape
        is_transposed = architecture in _TRANSPOSED_ARCHITECTURES
        modules[module] = (columns, rows) if is_transposed else (rows, columns)
        sources[module] = name
    return modules, sources, tuple(heads)


def _fingerprint(path: Path, config: Mapping[str, Any], weights: Mapping[str, list[Any]]) -> str:
    identity = {
        "config": {k: v for k, v in config.items() if k not in _VOLATILE_CONFIG},
        "tokenizer": {
            name: hashlib.sha256(_read(path / name)).hexdigest()
            for name in TOKENIZER_FILES
            if (path / name).exists()
        },
        "weights": weights,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"


class _Weight(NamedTuple):
    """What one pass over a tensor's bytes gives; ``norm`` is 0 where nobody asked."""

    dtype: str
    shape: list[int]
    sha256: str
    norm: float


def _read_weights(
    tensors: Mapping[str, tuple[Path, TensorInfo]], linear: Set[str]
) -> dict[str, _Weight]:
    def read(name: str) -> _Weight:
        file, info = tensors[name]
        sha256, squares = hashlib.sha256(), 0.0
        dtype = _LINEAR_DTYPES[info.dtype] if name in linear else None
        for chunk in _chunks(file, info.start, info.end):
            sha256.update(chunk)
            if dtype is not None:
                squares += _sum_of_squares(np.frombuffer(chunk, dtype))
        return _Weight(info.dtype, list(info.shape), sha256.hexdigest(), math.sqrt(squares))

    # hashlib and NumPy's products release the GIL, so threads work on all cores.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(read, tensors), strict=True))


def _sum_of_squares(values: npt.NDArray[Any]) -> float:
    if values.dtype == _LINEAR_DTYPES["BF16"]:
        # bfloat16 is the upper half of a float32: shifting is ten times faster than a cast.
        values = (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(values, values))


def _chunks(file: Path, start: int, end: int) -> Iterator[bytearray]:
    """Yield the bytes ``[start, end)`` of a file in pieces of ``_CHUNK_BYTES``, the last one shorter."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            while start < end:
                chunk = bytearray(min(_CHUNK_BYTES, end - start))
                if stream.readinto(chunk) != len(chunk):
                    raise CorruptArtifact(f"{file} was cut short while it was read")
                yield chunk
                start += len(chunk)
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error


def _weight_files(path: Path) -> list[Path]:
    """Return the shards that the index names, or the one unsharded file."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return [path / "model.safetensors"]
    weight_map = parse_json(_read(index), f"{index.name} of {path}").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CorruptArtifact(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    wrong = [name for name in names if Path(name).name != name]
    if wrong:
        raise CorruptArtifact(f"{index} names files outside its folder: {wrong[:3]}")
    return [path / name for name in names]


def _stamp(path: Path) -> list[list[Any]]:
    if not (path / "config.json").is_file():
        what = "no config.json in it" if path.is_dir() else "no such folder"
        raise BaseNotFound(f"no base model at {path}: {what}")
    optional = [path / name for name in (*TOKENIZER_FILES, "model.safetensors.index.json")]
    files = [path / "config.json", *(f for f in optional if f.exists()), *_weight_files(path)]
    return [_stat(file) for file in files]


def _stat(file: Path) -> list[Any]:
    try:
        stat = file.stat()
    except FileNotFoundError as error:
        raise BaseNotFound(
            f"base model at {file.parent} lacks {file.name}; Lorary reads safetensors weights only"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
    return [file.name, stat.st_size, stat.st_mtime_ns]


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptArtifact(f"{file} is larger than {_MAX_JSON_BYTES} bytes")
        return file.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from error


def _read_cached(path: Path, stamp: Iterable[list[Any]]) -> dict[str, Any] | None:
    file = path / CARD_FILE
    try:
        cached = json.loads(file.read_bytes())
        if cached["format_version"] != _FORMAT_VERSION or cached["stamp"] != stamp:
            return None
        card = dict(cached["card"])
        card["modules"] = {name: (shape[0], shape[1]) for name, shape in card["modules"].items()}
        card["head_modules"] = tuple(card["head_modules"])
        known = {field.name for field in dataclasses.fields(BaseCard)} - {"name"}
        return card if card.keys() == known else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        logger.warning(
            "ignoring %s, which cannot be used (%s); hashing the base again", file, error
        )
        return None


def _write_cached(path: Path, stamp: Iterable[list[Any]], card: Mapping[str, Any]) -> None:
    text = json.dumps({"format_version": _FORMAT_VERSION, "stamp": stamp, "card": card})
    file = path / CARD_FILE
    beside = path / f"{CARD_FILE}.tmp-{os.getpid()}"
    try:
        beside.write_text(text)
        beside.replace(file)
    except OSError as error:
        logger.info("not keeping the base's card in %s: %s", path, error.strerror or error)
