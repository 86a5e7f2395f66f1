"""R10: a version is used only with a right signature, where that is asked for; in a folder and on a hub."""

from __future__ import annotations

import base64
import datetime
import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from lorary.errors import ConfigError, CorruptArtifact, InvalidRequest
from lorary.registry import Registry
from lorary.registry.cli import app
from lorary.registry.cli_support import exit_code_of
from lorary.registry.mirror import mirror
from lorary.registry.trust import TrustPolicy

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

PEM = serialization.Encoding.PEM
Key = ec.EllipticCurvePrivateKey


def write_key(path: Path, key: Key) -> tuple[Path, Path]:
    """Write a private key and its public key; return both paths."""
    private = key.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.write_bytes(private)
    path.with_suffix(".pub").write_bytes(public)
    return path, path.with_suffix(".pub")


@dataclass(frozen=True)
class Keys:
    """Of a signer whom people trust, and of a stranger."""

    private: Path
    public: Path
    other_private: Path
    other_public: Path

    def policy(self, mode: str = "enforce") -> TrustPolicy:
        return TrustPolicy(mode=mode, keys=(self.public,))  # type: ignore[arg-type]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path / "home"))
    ours = write_key(tmp_path / "ours.pem", ec.generate_private_key(ec.SECP256R1()))
    theirs = write_key(tmp_path / "theirs.pem", ec.generate_private_key(ec.SECP384R1()))
    return Keys(*ours, *theirs)


def certificate(
    subject: str, key: Key, issuer: str, issuer_key: Key, *, days: int = 30, is_root: bool = False
) -> bytes:
    """Return a certificate (PEM) that ends in ``days`` and began 60 days before that, a root's 200."""
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    usage = x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - datetime.timedelta(days=200 if is_root else 60))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(issuer_key, hashes.SHA256())
        .public_bytes(PEM)
    )


def test_a_signed_version_is_used_and_no_other(
    forge: Forge, anywhere: Registry, keys: Keys, tmp_path: Path
) -> None:
    for seed in (1, 2):
        anywhere.push(forge.folder(str(seed), seed=seed), "a", base=forge.card, aliases=["prod"])
    strict = Registry.open(anywhere.url, trust=keys.policy())
    with pytest.raises(CorruptArtifact, match="a@2 is not signed"):
        strict.fetch(strict.resolve("a@prod"))
    anywhere.sign("a@2", keys.private, actor="ada")
    strict = Registry.open(anywhere.url, trust=keys.policy())
    assert strict.fetch(strict.resolve("a@prod")).exists()
    assert strict.pull("a@prod", tmp_path / "out").exists()
    with pytest.raises(CorruptArtifact, match="a@1 is not signed"):
        strict.pull("a@1", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    events = [(e.event, e.subject) for e in anywhere.audit("a") if e.event == "sign"]
    assert events == [("sign", "2")]
    anywhere.sign("a@2", keys.other_private)  # another signature takes its place
    strict = Registry.open(anywhere.url, trust=keys.policy())
    with pytest.raises(CorruptArtifact, match="no trusted key signed it"):
        strict.fetch(strict.resolve("a@prod"))
    _, by = anywhere.verify_signature(
        "a@2", TrustPolicy(mode="warn", keys=(keys.public, keys.other_public))
    )
    assert by == str(keys.other_public)


def test_signatures_go_along_with_a_mirror_where_they_hold(
    forge: Forge, anywhere: Registry, keys: Keys, tmp_path: Path
) -> None:
    for seed in (1, 2, 3):
        anywhere.push(forge.folder(str(seed), seed=seed), "a", base=forge.card, aliases=["prod"])
    for version in (1, 3):
        anywhere.sign(f"a@{version}", keys.private, actor="ada")
    anywhere.delete("a@1", reason="old")
    copy = Registry.open(tmp_path / "copy", create=True)
    (done,) = mirror(anywhere, copy)
    assert (done.num_signatures, done.num_unsigned) == (1, 0)
    strict = Registry.open(copy.url, trust=keys.policy())
    assert strict.fetch(strict.resolve("a@prod")).exists()
    with pytest.raises(CorruptArtifact, match="a@2 is not signed"):
        strict.fetch(strict.resolve("a@2"))
    assert [(e.actor, e.subject) for e in copy.audit("a") if e.event == "sign"] == [("ada", "3")]
    (again,) = mirror(anywhere, copy)
    assert (again.num_signatures, again.num_unsigned) == (0, 0)
    copy.sign("a@3", keys.other_private)
    anywhere.sign("a@3", keys.private)
    mirror(anywhere, copy)
    with pytest.raises(CorruptArtifact, match="no trusted key"):
        strict.fetch(strict.resolve("a@3"))


def test_a_mirror_on_a_hub_counts_the_signatures_that_do_not_hold_there(
    forge: Forge, registry: Registry, hub_url: str, keys: Keys
) -> None:
    registry.push(forge.folder("1"), "a", base=forge.card)
    registry.sign("a@1", keys.private)
    (done,) = mirror(registry, Registry.open(hub_url, create=True))
    assert (done.num_signatures, done.num_unsigned) == (0, 1)


def test_a_signature_holds_for_its_name_and_number_only(
    forge: Forge, registry: Registry, keys: Keys
) -> None:
    for name, seed in (("a", 1), ("a", 2), ("b", 1)):
        registry.push(forge.folder(f"{name}{seed}", seed=seed), name, base=forge.card)
    registry.sign("a@1", keys.private)
    root = Path(registry.url.removeprefix("file://")) / "adapters"
    signature = (root / "a" / "signatures" / "1.json").read_bytes()
    for name, version in (("a", 2), ("b", 1)):
        (root / name / "signatures").mkdir(exist_ok=True)
        (root / name / "signatures" / f"{version}.json").write_bytes(signature)
        with pytest.raises(CorruptArtifact, match=f"signature of {name}@{version}"):
            registry.verify_signature(f"{name}@{version}", keys.policy())
    # The whole version under another name: its manifest says what it is.
    (root / "b" / "versions" / "1.json").unlink()
    (root / "b" / "versions" / "1.json").write_bytes(
        (root / "a" / "versions" / "1.json").read_bytes()
    )
    with pytest.raises(CorruptArtifact, match="manifest is of a@1, not of b@1"):
        Registry.open(registry.url).verify_signature("b@1", keys.policy())


def test_an_older_version_behind_a_name_is_refused_until_it_is_accepted(
    forge: Forge, registry: Registry, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in (1, 2):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card, aliases=["prod"])
        registry.sign(f"a@{seed}", keys.private)
    strict = Registry.open(registry.url, trust=keys.policy())
    strict.fetch(strict.resolve("a@prod"))
    registry.rollback("a", "prod")
    with pytest.raises(CorruptArtifact, match=r"version 2 was used here before.*--accept-older"):
        strict.fetch(strict.resolve("a@prod"))
    strict.fetch(strict.resolve("a@1"))  # who names a number means it
    strict.fetch(strict.resolve("a"))
    mild = Registry.open(registry.url, trust=keys.policy("warn"))
    with caplog.at_level(logging.WARNING):
        mild.fetch(mild.resolve("a@prod"))
    assert "used all the same" in caplog.text
    registry.verify_signature("a@prod", keys.policy(), accept_older=True)
    strict.fetch(strict.resolve("a@prod"))
    registry.set_alias("a", "prod", 2)
    strict.fetch(strict.resolve("a@prod"))


def test_certificates(forge: Forge, registry: Registry, keys: Keys, tmp_path: Path) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    root_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root, leaf, expired = (tmp_path / f"{name}.crt" for name in ("root", "leaf", "expired"))
    root.write_bytes(certificate("root", root_key, "root", root_key, is_root=True, days=50))
    leaf.write_bytes(certificate("ada", leaf_key, "root", root_key))
    expired.write_bytes(certificate("ada", leaf_key, "root", root_key, days=-1))
    private, public = write_key(tmp_path / "leaf.pem", leaf_key)
    policy = TrustPolicy(mode="enforce", keys=(keys.public, root))
    registry.sign("a", private, certificate=leaf, chain=[root])
    assert registry.verify_signature("a", policy)[1] == str(root)
    with pytest.raises(CorruptArtifact, match="by a certificate, and this is a key"):
        registry.verify_signature("a", TrustPolicy(mode="enforce", keys=(public,)))
    stranger = tmp_path / "stranger.crt"
    stranger.write_bytes(certificate("root", leaf_key, "root", leaf_key, is_root=True))
    with pytest.raises(CorruptArtifact, match="no trusted key"):
        registry.verify_signature("a", TrustPolicy(mode="enforce", keys=(stranger,)))
    registry.sign("a", private, certificate=expired, chain=[root])
    with pytest.raises(CorruptArtifact, match="certificate held from"):
        registry.verify_signature("a", policy)
    with pytest.raises(InvalidRequest, match="does not match"):
        registry.sign("a", keys.private, certificate=leaf, chain=[root])


def test_signatures_that_are_damaged_or_say_too_little(
    forge: Forge, registry: Registry, keys: Keys
) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    registry.sign("a", keys.private)
    file = Path(registry.url.removeprefix("file://")) / "adapters" / "a" / "signatures" / "1.json"
    good = json.loads(file.read_bytes())
    statement = json.loads(base64.b64decode(good["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    forged = base64.b64encode(json.dumps(statement).encode()).decode()
    envelope = good["dsseEnvelope"]
    for bad in (
        b"",
        b"[]",
        b"{}",
        json.dumps({**good, "dsse_envelope": envelope}).encode(),
        json.dumps({**good, "dsseEnvelope": {**envelope, "payload": forged}}).encode(),
        json.dumps({**good, "verificationMaterial": {"publicKey": {}, "tlogEntries": []}}).encode(),
        json.dumps(good).encode().replace(b'{"mediaType"', b'{"mediaType": "x", "mediaType"'),
    ):
        file.write_bytes(bad)
        with pytest.raises(CorruptArtifact):
            registry.verify_signature("a", keys.policy())
    file.write_text(json.dumps(good))
    registry.verify_signature("a", keys.policy())


def test_a_signer_who_leaves_files_out_proves_nothing_of_them(
    forge: Forge, registry: Registry, keys: Keys, tmp_path: Path
) -> None:
    from typing import Any

    import model_signing

    library: Any = model_signing
    registry.push(forge.folder(), "a", base=forge.card)
    folder = registry.fetch(registry.resolve("a"))
    some = library.hashing.Config().set_ignored_paths(paths=["adapter_model.safetensors"])
    config = library.signing.Config().set_hashing_config(some)
    config.use_elliptic_key_signer(private_key=keys.private).sign(folder, tmp_path / "some.json")
    registry._store.put_signature("a", 1, (tmp_path / "some.json").read_bytes(), "ada")
    with pytest.raises(CorruptArtifact, match=r"does not cover adapter_model\.safetensors"):
        registry.verify_signature("a", keys.policy())


def test_stock_tools_verify_a_pulled_version(
    forge: Forge, registry: Registry, keys: Keys, tmp_path: Path
) -> None:
    registry.push(forge.folder(), "a", base=forge.card)
    registry.sign("a", keys.private)
    registry.pull("a", tmp_path / "out")
    file = Path(registry.url.removeprefix("file://")) / "adapters" / "a" / "signatures" / "1.json"
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(tmp_path / "out")]
    command += ["--public_key", str(keys.public), "--signature", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_policies_and_keys_that_cannot_be(
    forge: Forge, registry: Registry, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no key is trusted"):
        TrustPolicy(mode="warn")
    with pytest.raises(ConfigError, match="must be one of"):
        TrustPolicy(mode="on")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is no file"):
        TrustPolicy(mode="enforce", keys=(tmp_path / "none.pub",))
    registry.push(forge.folder(), "a", base=forge.card)
    edwards = tmp_path / "ed.pem"
    edwards.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    for key in (edwards, keys.public, tmp_path / "none.pem"):
        with pytest.raises(InvalidRequest, match="cannot sign with"):
            registry.sign("a", key)
    registry.sign("a", keys.private)
    with pytest.raises(InvalidRequest, match="neither a public key"):
        registry.verify_signature("a", TrustPolicy(mode="warn", keys=(keys.private,)))
    url = ["--registry", registry.url]
    run = [
        (["sign", "a@1", "--key", str(keys.private), *url], {}, 0),
        (["verify-signature", "a", "--trusted-keys", str(keys.public), *url], {}, 0),
        (["verify-signature", "a", "--trusted-keys", str(keys.other_public), *url], {}, 5),
        (["verify-signature", "a", *url], {}, 78),
        (["pull", "a", str(tmp_path / "1"), *url], {"LORARY_SIGNATURES": "enforce"}, 78),
        (["pull", "a", str(tmp_path / "2"), *url], {"LORARY_SIGNATURES": "enforce", "LORARY_TRUSTED_KEYS": str(keys.other_public)}, 5),
        (["pull", "a", str(tmp_path / "3"), *url], {"LORARY_SIGNATURES": "enforce", "LORARY_TRUSTED_KEYS": f"{keys.other_public}:{keys.public}"}, 0),
    ]  # fmt: skip
    for words, variables, code in run:
        with monkeypatch.context() as patched:
            for key_name, value in variables.items():
                patched.setenv(key_name, value)
            assert exit_code_of(lambda w=words: app(w, standalone_mode=False)) == code, words  # type: ignore[misc]
