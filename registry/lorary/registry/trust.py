"""Whose signatures this machine asks for before it uses a version.

=============  ======================================================================================
``off``        none
``warn``       whatever is wrong with a signature is logged, and the version is used
``enforce``    a version without a right signature is refused
=============  ======================================================================================

A right signature is by a trusted key, over exactly the version's files, whose manifest names the adapter, the
number, the digest and the base that were asked for: a signed version under another name or number is refused.

Refs that move (``name``, ``name@prod``) have a *floor* as well: the highest version that this machine has used
through them, kept under ``$LORARY_HOME/trust``. Who can write to a registry, but cannot sign, could
otherwise point ``prod`` at an old version whose faults are known. A rollback that is meant is accepted once, by
``registry verify-signature name@prod --accept-older``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self, cast, get_args

from lorary.errors import ConfigError, CorruptArtifact
from lorary.home import lorary_home
from lorary.registry.durable import (
    locked,
    make_folder,
    replace,
    storage_errors,
    unused_name,
    write_new,
)
from lorary.registry.folder import MANIFEST_FILE
from lorary.registry.manifest import Manifest
from lorary.registry.results import Resolved
from lorary.registry.signing import verify_folder
from lorary.registry.strict_json import parse_json
from lorary.registry.verify import check_identity
from lorary.registry.versions import Pointer

logger = logging.getLogger(__name__)

TrustMode = Literal["off", "warn", "enforce"]
MODES: Final[tuple[TrustMode, ...]] = get_args(TrustMode)
MODE_VARIABLE: Final = "LORARY_SIGNATURES"
KEYS_VARIABLE: Final = "LORARY_TRUSTED_KEYS"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustPolicy:
    """What is asked of signatures.

    Attributes:
        mode: ``off``, ``warn`` or ``enforce``.
        keys: PEM files of trusted public keys and root certificates.

    Raises:
        ConfigError: an unknown mode; or signatures are asked for, and no key is trusted or there.
    """

    mode: TrustMode = "off"
    keys: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"signatures are {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.mode != "off" and not self.keys:
            raise ConfigError(
                f"signatures are '{self.mode}', and no key is trusted; name PEM files with "
                f"--trusted-keys or {KEYS_VARIABLE}"
            )
        missing = [path for path in self.keys if not path.is_file()]
        if missing:
            raise ConfigError(f"trusted key {missing[0]} is no file")

    @classmethod
    def from_environment(cls) -> Self:
        """Return what LORARY_SIGNATURES and LORARY_TRUSTED_KEYS (paths with ':' between) say."""
        mode = cast("TrustMode", os.environ.get(MODE_VARIABLE) or "off")
        return cls(mode=mode, keys=key_paths(os.environ.get(KEYS_VARIABLE, "")))


def key_paths(text: str) -> tuple[Path, ...]:
    """Return the paths of a list with ':' between."""
    return tuple(Path(part).expanduser() for part in text.split(os.pathsep) if part)


class Trust:
    """Checks versions of one registry against a policy.

    Args:
        policy: what is asked for.
        url: the registry, whose floors are its own.
    """

    def __init__(self, policy: TrustPolicy, url: str) -> None:
        self.policy = policy
        self._url = url
        self._home = lorary_home() / "trust"

    def check(
        self, folder: Path, resolved: Resolved, pointer: Pointer, signature: bytes | None
    ) -> None:
        """Do what the policy says about a version whose files lie in ``folder``.

        Raises:
            CorruptArtifact: the policy is to enforce, and the signature is not right, or there is none.
        """
        if self.policy.mode == "off":
            return
        try:
            self.verify(folder, resolved, pointer, signature)
        except CorruptArtifact as error:
            if self.policy.mode == "enforce":
                raise
            logger.warning("used all the same: %s", error)

    def verify(
        self,
        folder: Path,
        resolved: Resolved,
        pointer: Pointer,
        signature: bytes | None,
        *,
        accept_older: bool = False,
    ) -> str:
        """Check a version's signature, and raise the ref's floor; return which key it was.

        Args:
            folder: the version's files.
            resolved: what was asked for.
            pointer: what its number stands for.
            signature: its signature, ``None`` if it has none.
            accept_older: set the floor to this version, even if it was higher.

        Raises:
            CorruptArtifact: it is not right, or the version is older than one used before.
        """
        where = f"{resolved.name}@{resolved.version}"
        if signature is None:
            raise CorruptArtifact(
                f"{where} is not signed; registry sign {where} --key KEY, or use another version"
            )
        try:
            key = verify_folder(folder, signature, self.policy.keys)
            manifest = Manifest.from_json((folder / MANIFEST_FILE).read_bytes())
            check_identity(resolved.name, pointer, manifest)
        except CorruptArtifact as error:
            raise CorruptArtifact(f"signature of {where}: {error}") from error
        if resolved.alias is not None:
            self._raise_floor(resolved, accept_older=accept_older)
        return key

    def floor(self, name: str, alias: str) -> int:
        """Return the highest version used through ``name@alias``, 0 if none was."""
        return self._floors().get(f"{name}@{alias}", 0)

    def _raise_floor(self, resolved: Resolved, *, accept_older: bool) -> None:
        ref = f"{resolved.name}@{resolved.alias}"
        with storage_errors(f"create {self._home}"):
            make_folder(self._home)
        with locked(self._home / "lock"):
            floors = self._floors()
            floor = floors.get(ref, 0)
            if resolved.version < floor and not accept_older:
                raise CorruptArtifact(
                    f"{ref} points at version {resolved.version}, and version {floor} was used here "
                    f"before: a signed version may be old. If it was rolled back on purpose: registry "
                    f"verify-signature {ref} --accept-older"
                )
            if resolved.version != floor:
                self._write({**floors, ref: resolved.version})

    def _file(self) -> Path:
        return self._home / "floors.json"

    def _all(self) -> dict[str, dict[str, int]]:
        file = self._file()
        with storage_errors(f"read {file}"):
            if not file.exists():
                return {}
            return parse_json(file.read_bytes(), str(file))

    def _floors(self) -> dict[str, int]:
        return self._all().get(self._url, {})

    def _write(self, floors: dict[str, int]) -> None:
        raw = json.dumps({**self._all(), self._url: floors}, indent=2).encode() + b"\n"
        staged = unused_name(self._home, "floors")
        with storage_errors(f"write {self._file()}"):
            write_new(staged, raw, mode=0o600)
            replace(staged, self._file())


def trusting(keys: Sequence[Path]) -> TrustPolicy:
    """Return a policy for one check by hand: these keys, or those of the environment."""
    found = tuple(keys) or key_paths(os.environ.get(KEYS_VARIABLE, ""))
    return TrustPolicy(mode="enforce", keys=found)
