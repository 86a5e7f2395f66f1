"""A server that enforces signatures loads what a trusted key signed, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lorary.client import Client
from lorary.errors import CorruptArtifact
from lorary.registry import Registry
from tests.processes import serving

if TYPE_CHECKING:
    from tests.e2e.conftest import World


def test_only_signed_adapters_are_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = serialization.Encoding.PEM
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "key.pub").write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    shutil.copytree(world.registry, tmp_path / "registry")
    registry = Registry.open(tmp_path / "registry")
    # By name: other tests push to this registry, too.
    first, second = (registry.resolve(f"{name}@1") for name in ("alpha", "bravo"))
    registry.sign(f"{first.name}@{first.version}", tmp_path / "key.pem")
    monkeypatch.setenv("LORARY_SIGNATURES", "enforce")
    monkeypatch.setenv("LORARY_TRUSTED_KEYS", str(tmp_path / "key.pub"))
    with (
        serving(world.base, tmp_path / "registry", tmp_path) as server,
        Client(server.address, timeout_s=120) as client,
    ):
        answer = client.generate(
            token_ids=[5, 9], adapter=f"{first.name}@{first.version}", max_tokens=2
        )
        assert answer.receipt.digest == first.digest
        with pytest.raises(CorruptArtifact, match="is not signed"):
            client.generate(
                token_ids=[5, 9], adapter=f"{second.name}@{second.version}", max_tokens=2
            )
