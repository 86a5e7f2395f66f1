"""Bad input against a real server: the right status, and right answers afterwards."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorary import errors
from lorary.registry import Registry
from tests.conftest import AdapterRecipe, build_adapter, write_manifest
from tests.e2e.conftest import registry_cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorary.client import Client
    from tests.e2e.conftest import Oracle, World

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CONTEXT = 256
PROMPT = [5, 9, 12, 30]


@pytest.fixture(autouse=True)
def server_lives_on(client: Client, oracle: Oracle) -> Iterator[None]:
    """After every test here the server still gives right answers, with an adapter and without."""
    yield
    for name in ("", "alpha"):
        answer = client.generate(token_ids=PROMPT, adapter=name, max_tokens=8)
        assert list(answer.token_ids) == oracle.greedy(name, PROMPT, 8)


def refused(client: Client, **call: Any) -> tuple[errors.LoraryError, grpc.StatusCode]:
    """Make a call that must fail; return its error and its status on the wire."""
    arguments: dict[str, Any] = {"token_ids": PROMPT, "max_tokens": 4} | call
    with pytest.raises(errors.LoraryError) as caught:
        client.generate(**arguments)
    cause: Any = caught.value.__cause__
    return caught.value, cause.code()


@pytest.mark.parametrize(
    ("ref", "error", "status"),
    [
        ("nobody", errors.AdapterNotFound, grpc.StatusCode.NOT_FOUND),
        ("alpha@canary", errors.AdapterNotFound, grpc.StatusCode.NOT_FOUND),
        ("alpha@99", errors.AdapterNotFound, grpc.StatusCode.NOT_FOUND),
        ("alpha@sha256:0123", errors.AdapterNotFound, grpc.StatusCode.NOT_FOUND),
        ("../alpha", errors.InvalidRef, INVALID),
        ("/etc/passwd", errors.InvalidRef, INVALID),
        ("alpha/../bravo", errors.InvalidRef, INVALID),
        ("file:///etc", errors.InvalidRef, INVALID),
        ("alpha@", errors.InvalidRef, INVALID),
        ("Alpha", errors.InvalidRef, INVALID),
        ("a\x00b", errors.InvalidRef, INVALID),
    ],
)
def test_a_ref_that_names_nothing(
    client: Client, ref: str, error: type[errors.LoraryError], status: grpc.StatusCode
) -> None:
    raised, found = refused(client, adapter=ref)
    assert type(raised) is error
    assert found == status


@pytest.mark.parametrize(
    ("call", "field"),
    [
        ({"token_ids": []}, "input.token_ids"),
        ({"token_ids": [10**6]}, "input.token_ids.ids[0]"),
        ({"token_ids": [5] * (CONTEXT + 1)}, "input"),
        ({"token_ids": None, "prompt": ""}, "input.prompt"),
        ({"token_ids": None, "text": " ", "adapter": "judge"}, "input.text"),
        ({"token_ids": None, "text": "x<|im_end|>", "adapter": "judge"}, "input.text"),
        ({"token_ids": None, "text": "no template", "adapter": "alpha"}, "input.text"),
        ({"token_ids": None, "messages": []}, "input.chat"),
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"max_tokens": CONTEXT}, "sampling.max_tokens"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ({"stop": [""]}, "sampling.stop[0]"),
    ],
)
def test_an_impossible_call_names_its_field(
    client: Client, call: dict[str, Any], field: str
) -> None:
    raised, status = refused(client, **call)
    assert isinstance(raised, errors.InvalidRequest)
    assert status == INVALID
    assert raised.field.startswith(field)


def test_an_adapter_of_another_base_is_incompatible(
    client: Client, world: World, other_base: Path, tmp_path: Path
) -> None:
    folder = build_adapter(other_base, tmp_path / "foreign", AdapterRecipe(seed=8))
    write_manifest(other_base, folder)
    registry_cli("push", folder, "foreign", "--base", other_base, "--registry", world.registry)
    raised, status = refused(client, adapter="foreign")
    assert isinstance(raised, errors.IncompatibleAdapter)
    assert status == grpc.StatusCode.FAILED_PRECONDITION


def test_a_damaged_blob_is_never_served(client: Client, world: World, tmp_path: Path) -> None:
    """One bit, flipped where it lies: the version is refused, and its neighbours are not."""
    folder = build_adapter(world.base, tmp_path / "bitrot", AdapterRecipe(seed=10))
    pushed = world.push(write_manifest(world.base, folder), "bitrot")
    flip_a_bit(world, pushed)
    raised, status = refused(client, adapter="bitrot")
    assert isinstance(raised, errors.CorruptArtifact)
    assert status == grpc.StatusCode.DATA_LOSS
    verify = registry_cli("verify", "--registry", world.registry, check=False)
    assert verify.returncode == errors.OUTCOMES[errors.CorruptArtifact].exit_code
    assert "bitrot" in verify.stdout + verify.stderr


def test_nan_never_reaches_the_registry(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(world.folders["alpha"], folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = np.nan
    save_file(tensors, file)
    refuse_push(world, folder, "finite")


def test_a_pickle_never_reaches_the_registry(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(world.folders["alpha"], folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04\x95")
    refuse_push(world, folder, "adapter_model")


def refuse_push(world: World, folder: Path, said: str) -> None:
    """Push what must be refused: one line, the code of damage, and a registry as it was."""
    before = world.versions()
    done = registry_cli(
        *("push", folder, "refused", "--base", world.base, "--registry", world.registry),
        check=False,
    )
    assert done.returncode == errors.OUTCOMES[errors.CorruptArtifact].exit_code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert world.versions() == before
    assert {path.name for path in (world.registry / "tmp").iterdir()} <= {"gc.lock"}


def flip_a_bit(world: World, pushed: dict[str, Any]) -> None:
    """Damage the tensors of a version in place, under every name that leads to them."""
    opened = Registry.open(world.registry)
    files = opened.manifest(opened.resolve(f"{pushed['name']}@{pushed['version']}")).files
    (tensors,) = (file for file in files if file.path.endswith(".safetensors"))
    (blob,) = world.registry.glob(f"blobs/**/{tensors.sha256}")
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)[0]
        file.seek(-3, 2)
        file.write(bytes([byte ^ 1]))
