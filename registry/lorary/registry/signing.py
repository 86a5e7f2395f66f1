"""Signatures of versions, in the format of OpenSSF model signing: a sigstore bundle over every file.

The manifest is among the signed files, and says which adapter, version, digest and base it is of, so that a
signature holds for that version under that name only. Keys are elliptic (P-256, P-384, P-521), with or without
a certificate; everything works offline. Needs ``lorary[signing]``.

``model_signing`` is asked to do what it does well, and what it leaves open is closed here: it takes an expired
certificate, files that the signer chose to leave out, and signatures that do not say whose key they need.
"""

from __future__ import annotations

import base64
import datetime
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from lorary.errors import CorruptArtifact, InvalidRequest, MissingDependency
from lorary.registry.durable import storage_errors
from lorary.registry.folder import MANIFEST_FILE
from lorary.registry.manifest import Manifest
from lorary.registry.strict_json import parse_json, show

MAX_SIGNATURE_BYTES: Final = 4 << 20
_STATEMENT: Final = "https://model_signing/signature/v1.0"
_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_PUBLIC_KEY: Final = b"-----BEGIN PUBLIC KEY-----"


def sign_folder(
    folder: Path, key: Path, *, certificate: Path | None = None, chain: Sequence[Path] = ()
) -> bytes:
    """Sign every file of a version.

    Args:
        folder: the version's folder, checked, with its manifest.
        key: an elliptic private key as PEM, not encrypted.
        certificate: of the key, as PEM.
        chain: the certificates between it and a root, as PEM.

    Returns:
        A sigstore bundle (JSON).

    Raises:
        InvalidRequest: the key or a certificate cannot be used.
        MissingDependency: ``model_signing`` is not installed.
    """
    signing = _library().signing
    config = signing.Config().set_hashing_config(_hashing())
    with tempfile.TemporaryDirectory(prefix="lorary-sign-") as scratch:
        bundle = Path(scratch) / "bundle.json"
        try:
            if certificate is None:
                config.use_elliptic_key_signer(private_key=key)
            else:
                config.use_certificate_signer(
                    private_key=key, signing_certificate=certificate, certificate_chain=chain
                )
        except (ValueError, TypeError, AttributeError, OSError) as error:
            # What the library raises depends on what is wrong: unknown keys, encrypted ones, no file …
            raise InvalidRequest(
                f"cannot sign with {key}: {error}. It takes an elliptic private key (P-256, P-384, "
                "P-521) as PEM that is not encrypted, and the certificate of that key.",
                field="key",
            ) from error
        config.sign(folder, bundle)
        return bundle.read_bytes()


def verify_folder(folder: Path, signature: bytes, trusted: Iterable[Path]) -> str:
    """Check that a trusted key signed exactly the files of ``folder``.

    Args:
        folder: the version's folder.
        signature: the bundle.
        trusted: PEM files, each a public key, or certificates that signers' certificates lead to.

    Returns:
        Which of the trusted files it was.

    Raises:
        CorruptArtifact: no trusted key signed this; the message says why for each.
        InvalidRequest: a trusted file is neither a key nor a certificate.
        MissingDependency: ``model_signing`` is not installed.
    """
    bundle = _parsed(signature)
    has_certificate = bundle["certificates"] != []
    reasons = []
    for path in trusted:
        with storage_errors(f"read {path}"):
            pem = path.read_bytes()
        if _CERTIFICATE not in pem and _PUBLIC_KEY not in pem:
            raise InvalidRequest(f"{path} is neither a public key nor a certificate (PEM)")
        if (_CERTIFICATE in pem) is not has_certificate:
            reasons.append(f"{path.name}: the signature is by {_kind(has_certificate)}")
            continue
        try:
            _verify(folder, signature, path, is_certificate=has_certificate)
        except Exception as error:  # noqa: BLE001 - three libraries raise what they like; all of it is no
            reasons.append(f"{path.name}: {' '.join(str(error).split()) or type(error).__name__}")
            continue
        if has_certificate:
            _check_dates(bundle["certificates"][0])
        _check_complete(folder, bundle["resources"])
        return str(path)
    raise CorruptArtifact(f"no trusted key signed it ({'; '.join(reasons) or 'none is trusted'})")


def _verify(folder: Path, signature: bytes, path: Path, *, is_certificate: bool) -> None:
    config = _library().verifying.Config().set_hashing_config(_hashing())
    if is_certificate:
        config.use_certificate_verifier(certificate_chain=[path])
    else:
        config.use_elliptic_key_verifier(public_key=path)
    with tempfile.TemporaryDirectory(prefix="lorary-verify-") as scratch:
        bundle = Path(scratch) / "bundle.json"
        bundle.write_bytes(signature)
        config.verify(folder, bundle)


def _check_dates(der: bytes) -> None:
    """The library looks at the day the certificate began; nothing proves that it was signed on that day."""
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(der)
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise CorruptArtifact(
            f"the signer's certificate held from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}; sign the version again"
        )


def _check_complete(folder: Path, resources: Sequence[str]) -> None:
    """A signer may leave files out; then nothing is known of them."""
    manifest = Manifest.from_json((folder / MANIFEST_FILE).read_bytes())
    needed = {MANIFEST_FILE, *(entry.path for entry in manifest.files)}
    missing = sorted(needed - set(resources))
    if missing:
        raise CorruptArtifact(f"the signature does not cover {missing[0]}; sign the version again")


def _parsed(signature: bytes) -> dict[str, Any]:
    """Return what is needed of a bundle, before any of it is believed."""
    try:
        # No key twice, and none but these: the library must not read another signature in it than we do.
        bundle = parse_json(signature, "the signature")
        material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
        chain = material.get("x509CertificateChain", {"certificates": []})
        _check_keys(bundle, "mediaType", "verificationMaterial", "dsseEnvelope")
        _check_keys(material, "publicKey", "x509CertificateChain", "tlogEntries")
        _check_keys(envelope, "payload", "payloadType", "signatures")
        _check_keys(chain, "certificates")
        chain = chain["certificates"]
        statement = parse_json(base64.b64decode(envelope["payload"]), "the signed statement")
        found = {
            "certificates": [base64.b64decode(entry["rawBytes"]) for entry in chain],
            "resources": [entry["name"] for entry in statement["predicate"]["resources"]],
        }
        is_right = statement["predicateType"] == _STATEMENT and (
            found["certificates"] or material["publicKey"]["hint"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"the signature is damaged: {error!r}") from error
    if not is_right:
        raise CorruptArtifact("the signature is no OpenSSF model signature that names its key")
    return found


def _check_keys(fields: dict[str, Any], *known: str) -> None:
    unknown = sorted(fields.keys() - set(known))
    if unknown:
        raise CorruptArtifact(
            f"the signature is damaged: it has the unknown key {show(unknown[0])}"
        )


def _kind(has_certificate: bool) -> str:
    return (
        "a certificate, and this is a key"
        if has_certificate
        else "a key, and this is a certificate"
    )


def _hashing() -> Any:
    """Return how files are hashed: every file on its own, none left out."""
    config = _library().hashing.Config()
    return config.use_file_serialization(hashing_algorithm="sha256").set_ignored_paths(
        paths=[], ignore_git_paths=False
    )


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise MissingDependency(
            f"signatures need {error.name or error}: pip install 'lorary[signing]'"
        ) from error
    return model_signing
