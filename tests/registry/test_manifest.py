from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from lorary.errors import CorruptArtifact
from lorary.registry import Manifest
from lorary.registry.manifest import FileEntry, GoldenProbe, Metrics
from lorary.registry.strict_json import parse_json

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


@pytest.fixture
def full(forge: Forge) -> Manifest:
    return dataclasses.replace(
        forge.manifest(kind="classification", template="{{ text }} → é", labels=("no", "yes")),
        metrics=Metrics(
            primary="accuracy", num_examples=9, base={"accuracy": 0.1}, adapter={"accuracy": 0.9}
        ),
        golden_probes=(
            GoldenProbe(token_ids=(1, 2), top_token_ids=(3,), top_logits=(0.5,), dtype="float32"),
        ),
        files=(FileEntry(path="report/loss.png", size=3, sha256="ab" * 32),),
        data={"source": "x", "num_train": 3},
        training={"recipe": {"a": [1, None]}},
        name="a",
        version=3,
    )


def test_a_manifest_reads_back_as_it_was(full: Manifest) -> None:
    assert Manifest.from_json(full.to_json()) == full
    assert Manifest.from_json(full.to_json().encode()) == full


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 2}, "Upgrade"),
        ({"format_version": None}, "Upgrade"),
        ({"more": 1}, "unknown key 'more'"),
        ({"x" * 10_000: 1}, "unknown key"),
        ({"base": None}, "must be an object"),
        ({"base": {"name": "x"}}, "lacks"),
        ({"version": "3"}, "must be of type int"),
        ({"version": True}, "must be of type int"),
        ({"created_at": 3}, "must be of type str"),
        ({"golden_probes": {}}, "must be a list"),
        ({"golden_probes": [1]}, r"golden_probes\[0\]"),
        ({"data": []}, "must be an object"),
        ({"files": [{"path": "../x", "size": 1, "sha256": "ab" * 32}]}, "cannot be one"),
        ({"files": [{"path": "/x", "size": 1, "sha256": "ab" * 32}]}, "cannot be one"),
        ({"files": [{"path": "a/b/c", "size": 1, "sha256": "ab" * 32}]}, "cannot be one"),
        ({"files": [{"path": "x", "size": -1, "sha256": "ab" * 32}]}, "cannot be one"),
        ({"files": [{"path": "x", "size": 1, "sha256": "AB" * 32}]}, "cannot be one"),
        ({"description": "x" * 100_000, "version": "x" * 100_000}, "must be of type int"),
    ],
)
def test_a_manifest_that_is_wrong(full: Manifest, changes: dict[str, Any], reason: str) -> None:
    raw = json.loads(full.to_json()) | changes
    with pytest.raises(CorruptArtifact, match=reason) as caught:
        Manifest.from_json(json.dumps(raw))
    assert len(str(caught.value)) < 1000


def test_nested_values_are_checked(full: Manifest) -> None:
    raw = json.loads(full.to_json())
    for path, value in (
        (("task", "kind"), "poetry"),
        (("task", "labels"), [1]),
        (("metrics", "base"), {"accuracy": "high"}),
        (("metrics", "base"), {"accuracy": 10**400}),
        (("method", "alpha"), "16"),
        (("base", "revision"), 3),
    ):
        broken = json.loads(json.dumps(raw))
        broken[path[0]][path[1]] = value
        with pytest.raises(CorruptArtifact, match=rf"manifest\.{path[0]}\.{path[1]}"):
            Manifest.from_json(json.dumps(broken))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"null", b"[]", b"1", b'"x"', b"{", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff\xfe{}",
        b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}', b'{"a":' * 5000, b"[" * 200_000,
    ],
)  # fmt: skip
def test_what_is_no_strict_json(raw: bytes) -> None:
    with pytest.raises(CorruptArtifact, match=r"^thing "):
        parse_json(raw, "thing")


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "thing") == {"a": "\U0001f600"}
