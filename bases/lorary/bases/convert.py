"""GGUF to safetensors, once per file; loading a GGUF takes half a minute, its conversion a second."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from typing import TYPE_CHECKING

from lorary.bases.once import build_once
from lorary.errors import CorruptArtifact, MissingDependency
from lorary.home import lorary_home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Part of the cache key: raise it when the conversion itself changes.
CONVERSION = 1


def converted_gguf(gguf: Path, name: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of ``gguf`` as bfloat16 safetensors with its tokenizer, made when absent.

    The folder is ``$LORARY_HOME/bases/<name>-<content hash>``: another file under the same name is
    another base.

    Raises:
        CorruptArtifact: transformers cannot read the file.
        StorageError: the cache cannot be written.
    """
    folder = lorary_home() / "bases" / f"{name}-{_content_key(gguf)}"
    if not folder.is_dir() and progress is not None:
        progress(f"converting {gguf.name} to safetensors (once, about half a minute)")
    build_once(folder, lambda draft: _convert(gguf, draft))
    return folder


def _content_key(path: Path) -> str:
    """Hash the file; 0.1 s for 100 MB, which a changed file under an old name is worth."""
    digest = hashlib.sha256(f"v{CONVERSION}\n".encode())
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _convert(gguf: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of ``gguf`` into ``folder``."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingDependency(
            f"reading GGUF needs torch and transformers ({error}). Run: pip install 'lorary[model]'"
        ) from error
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
            # dequantize: else a quantizer stays attached and the model can be neither trained
            # nor saved.
            model = AutoModelForCausalLM.from_pretrained(
                **source,
                local_files_only=True,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
        except ImportError as error:
            raise MissingDependency(f"{error}. Run: pip install 'lorary[model]'") from error
        except (ValueError, KeyError, IndexError, OSError, NotImplementedError) as error:
            raise CorruptArtifact(
                f"'{gguf}' cannot be read as a GGUF language model: {error}. "
                "Use a file whose architecture transformers supports, or a safetensors folder."
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which would hide a shared cache


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the conversion's progress bars and notes off the terminal; errors still raise.

    transformers warns that packed weights need float32; it does not apply to dequantized ones.
    """
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        # The dequantizer draws a tqdm bar on stderr that no setting turns off.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
