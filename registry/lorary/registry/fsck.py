"""Look for everything that can be wrong with a registry, and put right what can be put right.

*Damage* is what a reader could come upon: a file that is not what was promised, a version that cannot be
read, a log that does not add up. *Litter* is what killed processes left and nobody reads. Damage that stays
is exit code 5; litter never is.

A repair never makes anything up. A file is restored from another copy whose hash is right: the unpacked
folder's, or another registry's. A version's file is made again from the manifest that the audit log
names, or from the only manifest that says it is of that version. What has no such source stays damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from lorary.errors import LoraryError
from lorary.registry.backend import Store
from lorary.registry.blobs import Progress
from lorary.registry.verify import verify_all

Severity = Literal["damage", "litter"]

GRACE_S: Final = 24 * 3600.0
"""How old work in progress must be before it is taken for a left-over."""
_ROUNDS: Final = 4
"""A repair may bring to light what could not be looked at before: a version's file, then its blobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        where: a version (``sentiment@3``), an adapter, or a path inside the registry.
        problem: what is wrong with it.
        severity: ``damage`` or ``litter``.
        repair: what ``--repair`` does about it; empty when nothing here can put it right.
        is_repaired: whether that was done, and looked at again.
    """

    where: str
    problem: str
    severity: Severity = "damage"
    repair: str = ""
    is_repaired: bool = False


@dataclass(frozen=True, slots=True)
class Issue:
    """A finding, and the function that puts it right."""

    finding: Finding
    act: Callable[[], None] | None = None


@dataclass(slots=True)
class Scan:
    """What one look at a registry found."""

    issues: list[Issue] = field(default_factory=list)
    versions: int = 0
    blobs: int = 0
    spare_blobs: int = 0
    spare_bytes: int = 0

    def add(
        self,
        where: str,
        problem: str,
        *,
        severity: Severity = "damage",
        repair: str = "",
        act: Callable[[], None] | None = None,
    ) -> None:
        """Note an issue."""
        finding = Finding(where=where, problem=problem, severity=severity, repair=repair)
        self.issues.append(Issue(finding, act))


@dataclass(frozen=True, slots=True, kw_only=True)
class FsckReport:
    """The result of ``Registry.fsck``.

    Attributes:
        findings: in the order in which they were met; empty when all is well.
        versions: how many versions were looked at.
        blobs: how many blobs were read.
        spare_blobs: blobs that no version refers to, which ``gc`` frees.
        spare_bytes: their bytes.
    """

    findings: tuple[Finding, ...]
    versions: int
    blobs: int
    spare_blobs: int
    spare_bytes: int

    @property
    def damage(self) -> tuple[Finding, ...]:
        """The damage that is there still."""
        return tuple(f for f in self.findings if f.severity == "damage" and not f.is_repaired)

    @property
    def is_ok(self) -> bool:
        """Whether no damage is left."""
        return not self.damage


def fsck(
    store: Store,
    *,
    repair: bool = False,
    sources: Sequence[Store] = (),
    grace_s: float = GRACE_S,
    actor: str = "",
    progress: Progress | None = None,
) -> FsckReport:
    """Look at everything; with ``repair``, put right what can be, and look again.

    Args:
        store: a folder, or a Hub.
        repair: whether to change anything.
        sources: registries that damaged files may be restored from.
        grace_s: age from which work in progress is taken for a left-over, in seconds.
        actor: who repairs, for the audit log.
        progress: told of bytes read.

    Raises:
        StorageError: a folder cannot be read, or with ``repair`` not be written.
    """
    from lorary.registry.local import LocalStore

    look: Callable[[], Scan]
    if isinstance(store, LocalStore):
        from lorary.registry.fsck_local import LocalCheck

        look = LocalCheck(store, sources, grace_s, actor, progress).scan
    else:
        look = _hub_look(store, progress)
    scan = look()
    seen: dict[tuple[str, str], Finding] = {}
    failed: dict[tuple[str, str], str] = {}
    for _ in range(_ROUNDS):
        seen.update({_key(issue.finding): issue.finding for issue in scan.issues})
        fixable = [i for i in scan.issues if i.act and _key(i.finding) not in failed]
        if not repair or not fixable:
            break
        for issue in fixable:
            try:
                assert issue.act is not None
                issue.act()
            except LoraryError as error:
                failed[_key(issue.finding)] = str(error)
        scan = look()
    left = {_key(issue.finding) for issue in scan.issues}
    findings = [
        replace(
            finding,
            is_repaired=key not in left,
            problem=finding.problem + (f" (repair failed: {failed[key]})" if key in failed else ""),
        )
        for key, finding in seen.items()
    ]
    return FsckReport(
        findings=tuple(findings),
        versions=scan.versions,
        blobs=scan.blobs,
        spare_blobs=scan.spare_blobs,
        spare_bytes=scan.spare_bytes,
    )


def _key(finding: Finding) -> tuple[str, str]:
    return finding.where, finding.problem


def _hub_look(store: Store, progress: Progress | None) -> Callable[[], Scan]:
    """Return the look at a Hub: all files fetched and compared, logs read, tags where they belong."""
    from lorary.registry.hub import HubStore

    if not isinstance(store, HubStore):
        raise TypeError(f"fsck knows folders and Hubs, not {type(store).__name__}")

    def look() -> Scan:
        scan, report = Scan(), verify_all(store, progress)
        for check in report.checks:
            scan.versions += 1
            if check.problem:
                scan.add(f"{check.name}@{check.version}", check.problem)
        for problem in report.problems:
            name, _, what = problem.partition(": ")
            scan.add(name, what)
        for name in store.names():
            for version in store.untagged(name):
                scan.add(
                    f"{name}@{version}",
                    f"tag v{version} is missing: its pusher died before setting it",
                    repair="set the tag",
                    act=lambda name=name: store.tag_missing(name),  # type: ignore[misc]
                )
        return scan

    return look
