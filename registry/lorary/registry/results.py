"""What the registry answers: plain values, safe to keep, compare and print."""

from __future__ import annotations

from dataclasses import dataclass

from lorary.registry.manifest import Metrics, TaskKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The version that a ref means just now.

    Attributes:
        name: the adapter.
        version: its number.
        digest: the identity of its content; key caches on this and never on the name.
        alias: the alias the ref went through, ``latest`` for a bare name; ``None`` for a number or digest.
        deprecated: when, by whom and why it was deprecated; empty if it was not.
    """

    name: str
    version: int
    digest: str
    alias: str | None = None
    deprecated: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionInfo:
    """One version, for people.

    Attributes:
        aliases: those that point at this version now, without ``latest``.
        created_at: when it was pushed, UTC.
        size_bytes: all files but the manifest.
        rank: the largest rank of any module.
        deprecated: when, by whom and why it was deprecated; empty if it was not.
    """

    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    created_at: str
    size_bytes: int
    rank: int
    base_name: str
    base_fingerprint: str
    task_kind: TaskKind
    metrics: Metrics | None
    deprecated: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionCheck:
    """The result of verifying one version; ``problem`` is empty when all is well."""

    name: str
    version: int
    digest: str
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of ``Registry.verify``.

    Attributes:
        checks: one entry per version.
        problems: what is wrong apart from single versions (alias logs), one line each.
    """

    checks: tuple[VersionCheck, ...]
    problems: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not any(check.problem for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """What ``Registry.gc`` removed, or would remove.

    Attributes:
        num_blobs: files that no version needs.
        num_folders: unpacked versions that were deleted.
        num_left_overs: work that was never finished.
        num_bytes: what the file system gains.
        notes: what cannot be freed from here, and how it can, one line each.
    """

    num_blobs: int
    num_folders: int
    num_left_overs: int
    num_bytes: int
    notes: tuple[str, ...] = ()
