"""Find a base model by short name, local folder, or Hub id, and say exactly which one it is."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorary.bases.assets import find_asset
from lorary.bases.catalog import CATALOGUE
from lorary.bases.convert import converted_gguf
from lorary.errors import AccessDenied, BaseNotFound, RegistryUnavailable
from lorary.registry import BaseCard

if TYPE_CHECKING:
    from collections.abc import Callable

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(@[\w./-]{1,96})?")
# Weights as safetensors, the config, the tokenizer in any form; never code, never pickles.
_HUB_FILES = [
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "chat_template*"),
]
_HUB_SKIPPED = ["*/*", "*.py", "*.bin", "*.pt", "*.pth"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model on this machine: what people call it, where it is, and its identity."""

    name: str
    path: Path
    card: BaseCard
    revision: str | None = None


def find_base(name: str | Path, *, progress: Callable[[str], None] | None = None) -> Base:
    """Find a base; convert or download it first when needed.

    Args:
        name: a short name (``smollm2-135m``), a folder with safetensors or one ``*.gguf``, such a
            file itself, or a Hub id (``org/model``, ``org/model@revision``).
        progress: told, in one line, about anything that takes longer than a moment.

    Raises:
        BaseNotFound: none of these; the message names what was tried.
        MissingDependency: a short name whose asset package is not fetched.
        AccessDenied: the Hub wants a token.
        RegistryUnavailable: the Hub cannot be reached and the model is not in its cache.
        CorruptArtifact: the files are not a causal language model.
    """
    text = str(name).strip()
    if text in CATALOGUE:
        entry = CATALOGUE[text]
        folder = converted_gguf(find_asset(entry.package, entry.gguf), text, progress=progress)
        return Base(name=text, path=folder, card=BaseCard.from_folder(folder, text))
    path = Path(text).expanduser()
    if text and path.exists():
        folder = _local_folder(path, progress)
        label = path.resolve().stem if path.is_file() else path.resolve().name
        return Base(name=label, path=folder, card=BaseCard.from_folder(folder, label))
    if isinstance(name, str) and _HUB_ID.fullmatch(text) and not text.startswith((".", "/", "~")):
        return _from_hub(text, progress)
    near = difflib.get_close_matches(text, CATALOGUE, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise BaseNotFound(
        f"base '{text}' is neither a short name ({', '.join(sorted(CATALOGUE))}), nor an existing "
        f"folder, nor a Hub id like 'org/model'.{hint}"
    )


def _local_folder(path: Path, progress: Callable[[str], None] | None) -> Path:
    """Return a safetensors folder for a local folder or GGUF file."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise BaseNotFound(
                f"'{path}' is a file, and not a .gguf; give the folder with config.json."
            )
        return converted_gguf(path, path.stem, progress=progress)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path.resolve()
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return converted_gguf(ggufs[0], ggufs[0].stem, progress=progress)
    if ggufs:
        names = ", ".join(gguf.name for gguf in ggufs)
        raise BaseNotFound(f"'{path}' holds several GGUF files ({names}); name one of them.")
    raise BaseNotFound(
        f"'{path}' is no base model: it holds neither config.json with *.safetensors nor a *.gguf. "
        "Weights in .bin or .pt are not read; convert them to safetensors."
    )


def _from_hub(text: str, progress: Callable[[str], None] | None) -> Base:
    """Download (or find in the Hub's own cache) a model by id."""
    repo, _, revision = text.partition("@")
    if progress is not None:
        progress(f"looking '{repo}' up on the Hub")
    folder = _snapshot(repo, revision or None)
    if not any(folder.glob("*.safetensors")):
        raise BaseNotFound(
            f"'{repo}' on the Hub has no safetensors weights; pickled weights are not read. "
            "Choose a revision that has them."
        )
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Base(name=repo, path=folder, card=BaseCard.from_folder(folder, repo), revision=commit)


def _snapshot(repo: str, revision: str | None) -> Path:
    """Call the Hub; its errors become ours, each with what to do."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED
            )
        )
    except hub.GatedRepoError as error:
        raise AccessDenied(
            f"'{repo}' is gated on the Hub. Accept its terms there, then set HF_TOKEN."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise BaseNotFound(
            f"the Hub has no model '{repo}', or it is private. Check the spelling, or set HF_TOKEN."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise BaseNotFound(f"'{repo}' on the Hub has no revision '{revision}'.") from error
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise AccessDenied(
                f"the Hub refuses '{repo}' (HTTP {status}). Set HF_TOKEN to a token that may read it."
            ) from error
        raise RegistryUnavailable(
            f"the Hub answered HTTP {status} for '{repo}'. Try again later."
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
            raise BaseNotFound(
                f"'{repo}' is not in the Hub's local cache, and HF_HUB_OFFLINE forbids looking "
                "further. Unset it, or give a local folder."
            ) from error
        raise RegistryUnavailable(
            f"the Hub cannot be reached for '{repo}', and it is not in the local cache. Check the "
            f"network, or use a base that needs no hub: {', '.join(sorted(CATALOGUE))}."
        ) from error
    except hub.HFValidationError as error:
        raise BaseNotFound(f"'{repo}' is not a valid Hub id: {error}") from error
    except OSError as error:
        raise RegistryUnavailable(
            f"the Hub cannot be reached for '{repo}': {error}. Check the network."
        ) from error
