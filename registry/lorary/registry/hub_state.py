"""What one adapter's repository says about versions and aliases, read at one commit.

The repository's head holds, beside the newest version's files::

    .lorary/versions.jsonl   one line per version: its number, digest, and its manifest's sha256
    .lorary/aliases.jsonl    one line per move of an alias (aliases)
    .lorary/marks.jsonl      one line per deprecation, deletion, protection (marks)
    .lorary/nonce            different in every commit

The logs are only ever appended to, in a commit whose parent is the head that was read. Thus whoever
commits has seen everything, and of two who race one is refused. The nonce is there because a client leaves
out files that the head has already: two equal changes would otherwise both seem to win.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from lorary.errors import CorruptArtifact
from lorary.registry.aliases import AliasMove, parse_moves, replay
from lorary.registry.hub_client import HubClient
from lorary.registry.marks import NO_MARKS, Marks, parse_marks
from lorary.registry.splits import Split, replay_splits
from lorary.registry.strict_json import parse_json
from lorary.registry.versions import Pointer, parse_pointer

logger = logging.getLogger(__name__)

STATE_FOLDER: Final = ".lorary"
VERSIONS_FILE: Final = f"{STATE_FOLDER}/versions.jsonl"
ALIASES_FILE: Final = f"{STATE_FOLDER}/aliases.jsonl"
MARKS_FILE: Final = f"{STATE_FOLDER}/marks.jsonl"
_NONCE_FILE: Final = f"{STATE_FOLDER}/nonce"
_MAX_LOG_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class HubState:
    """Versions and aliases of one adapter, as of ``head``.

    Attributes:
        head: the commit that was read; empty when there is no repository.
        versions: one per version, from 1: its pointer, or what is wrong with its line.
        moves: all moves of aliases, or what is wrong with the log.
        aliases: where every alias points.
        known_marks: all marks, or what is wrong with the log.
        splits: the canaries that run, by alias.
        raw_versions: the file, to be appended to.
        raw_aliases: the file, to be appended to.
        raw_marks: the file, to be appended to.
    """

    head: str = ""
    versions: tuple[Pointer | CorruptArtifact, ...] = ()
    moves: tuple[AliasMove, ...] | CorruptArtifact = ()
    aliases: Mapping[str, int] = field(default_factory=dict)
    known_marks: Marks | CorruptArtifact = NO_MARKS
    splits: Mapping[str, Split] = field(default_factory=dict)
    raw_versions: bytes = b""
    raw_aliases: bytes = b""
    raw_marks: bytes = b""

    @property
    def newest(self) -> int:
        """The newest version's number, 0 if there is none."""
        return len(self.versions)

    def pointer(self, version: int) -> Pointer | None:
        """Return a version's pointer, ``None`` if there is no such version.

        Raises:
            CorruptArtifact: its line is damaged.
        """
        if not 1 <= version <= self.newest:
            return None
        found = self.versions[version - 1]
        if isinstance(found, CorruptArtifact):
            raise found
        return found

    def readable(self) -> Iterator[Pointer]:
        """Yield the pointers that can be read, oldest first; a damaged one is logged and left out."""
        for version, found in enumerate(self.versions, start=1):
            if isinstance(found, CorruptArtifact):
                logger.warning("leaving out version %d: %s", version, found)
            else:
                yield found

    def alias_moves(self) -> tuple[AliasMove, ...]:
        """Return all moves.

        Raises:
            CorruptArtifact: the log is damaged.
        """
        if isinstance(self.moves, CorruptArtifact):
            raise self.moves
        return self.moves

    def alias_state(self) -> Mapping[str, int]:
        """Return where every alias points.

        Raises:
            CorruptArtifact: the log is damaged.
        """
        self.alias_moves()
        return self.aliases

    def marks(self) -> Marks:
        """Return all marks.

        Raises:
            CorruptArtifact: the log is damaged.
        """
        if isinstance(self.known_marks, CorruptArtifact):
            raise self.known_marks
        return self.known_marks

    def alias_splits(self) -> Mapping[str, Split]:
        """Return the canaries that run, by alias; raises as ``alias_state``."""
        self.alias_moves()
        return self.splits


NOTHING: Final = HubState()
"""Of an adapter that has no repository."""


def read_state(client: HubClient, repo_id: str, head: str) -> HubState:
    """Read a repository's logs at a commit; a repository without them has no versions."""
    raw_versions = client.read(repo_id, VERSIONS_FILE, head, _MAX_LOG_BYTES)
    if raw_versions is None:
        return HubState(head=head)
    raw_aliases = client.read(repo_id, ALIASES_FILE, head, _MAX_LOG_BYTES) or b""
    moves: tuple[AliasMove, ...] | CorruptArtifact
    try:
        moves = parse_moves(raw_aliases, f"{ALIASES_FILE} of {repo_id}")
    except CorruptArtifact as error:
        moves = error
    raw_marks = client.read(repo_id, MARKS_FILE, head, _MAX_LOG_BYTES) or b""
    marks: Marks | CorruptArtifact
    try:
        marks = parse_marks(raw_marks, f"{MARKS_FILE} of {repo_id}")
    except CorruptArtifact as error:
        marks = error
    return HubState(
        head=head,
        known_marks=marks,
        raw_marks=raw_marks,
        versions=tuple(_versions(raw_versions, repo_id)),
        moves=moves,
        aliases={} if isinstance(moves, CorruptArtifact) else replay(moves),
        splits={} if isinstance(moves, CorruptArtifact) else replay_splits(moves),
        raw_versions=raw_versions,
        raw_aliases=raw_aliases,
    )


def appended(
    state: HubState, *, version: bytes = b"", move: bytes = b"", mark: bytes = b""
) -> dict[str, bytes]:
    """Return the files that a commit on top of ``state`` must bring, with a line more in some of them."""
    files = {_NONCE_FILE: uuid.uuid4().hex.encode() + b"\n"}
    if version or not state.head:
        files[VERSIONS_FILE] = state.raw_versions + version
    if move:
        files[ALIASES_FILE] = state.raw_aliases + move
    if mark:
        files[MARKS_FILE] = state.raw_marks + mark
    return files


def _versions(raw: bytes, repo_id: str) -> Iterator[Pointer | CorruptArtifact]:
    lines = raw.split(b"\n")
    for version, line in enumerate(lines[:-1], start=1):
        where = f"line {version} of {VERSIONS_FILE} of {repo_id}"
        try:
            yield parse_pointer(parse_json(line, where), version, where)
        except CorruptArtifact as error:
            yield error
