"""The corpus of hostile adapters, run against every place where an adapter comes in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lorary.errors import CorruptArtifact, IncompatibleAdapter, InvalidRef
from lorary.registry import Registry
from lorary.registry.address import local_path
from lorary.registry.folder import CONFIG_FILE, TENSORS_FILE
from lorary.registry.layouts import Layouts
from lorary.registry.local import LocalStore
from lorary.registry.manifest import FileEntry
from lorary.registry.poison import HOSTILE_NAMES, Attack, Victim, attacks, run_against, write_corpus
from lorary.registry.refs import check_name
from lorary.server.adapters.loader import ReadBuffer, TensorBytes, load_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.registry import BaseCard

ATTACKS = attacks()
# What only the values or the base itself tell; a pull has no base, and servers do.
NEEDS_BASE = {
    "layer-999", "of-another-base", "half-of-the-layers", "head-as-a-target", "dora-without-magnitudes",
}  # fmt: skip
# A registry holds bytes: what a file was, a link or set-user, is not kept.
HARMLESS_AS_BYTES = {"set-user-bit", "symlink-to-a-secret", "symlink-to-a-folder"}
AT_A_PULL = [
    attack
    for attack in ATTACKS
    if attack.kind in ("files", "header", "config", "keys")
    and attack.name not in NEEDS_BASE | HARMLESS_AS_BYTES
    and not attack.only_at_push
]


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns that take for ever are given up soon; the others get all the time of a busy machine."""
    callspec = getattr(request.node, "callspec", None)
    attack = callspec.params.get("attack") if callspec else None
    is_endless = attack is not None and attack.says == "takes longer"
    monkeypatch.setattr(
        "lorary.registry.module_patterns.MATCH_TIMEOUT_S", 0.5 if is_endless else 60.0
    )


@pytest.fixture(scope="module")
def honest(card: BaseCard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every attack begins as."""
    folder = tmp_path_factory.mktemp("honest") / "honest"
    Victim(folder, card).write_honest()
    return folder


@pytest.fixture(scope="module")
def attacked(card: BaseCard, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every attack in a folder of its own."""
    corpus = write_corpus(card, tmp_path_factory.mktemp("corpus") / "corpus")
    return {attack.name: corpus / attack.name for attack in ATTACKS}


@pytest.fixture(scope="module")
def shared(honest: Path, card: BaseCard, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A registry with the honest adapter in it."""
    registry = Registry.open(tmp_path_factory.mktemp("registry") / "registry", create=True)
    registry.push(honest, "honest", base=card)
    return registry


def check_refusal(call: Callable[[], object], attack: Attack) -> None:
    """Check that ``call`` refuses with the class and a message that names the reason."""
    with pytest.raises(attack.error) as caught:
        call()
    message = str(caught.value)
    assert attack.says in message
    assert len(message) < 800
    assert message.isprintable(), "a foreign name may not bring its own line breaks"


def by_name(found: list[Attack] | tuple[Attack, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("attack", found, ids=[attack.name for attack in found])


def test_names_are_unique_and_all_kinds_are_there() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) > 150
    kinds = {attack.kind for attack in ATTACKS}
    assert kinds == {"files", "header", "keys", "values", "config", "base"}


def test_the_honest_adapter_is_taken_everywhere(
    honest: Path, card: BaseCard, registry: Registry, tmp_path: Path
) -> None:
    """If this one were refused, the refusals below would prove nothing."""
    registry.push(honest, "a", base=card)
    registry.pull("a", tmp_path / "pulled")
    loaded = load_adapter(honest, card, modules=frozenset(card.modules), max_rank=64)
    assert loaded.rank == 4


@by_name(ATTACKS)
def test_a_push_refuses(
    attack: Attack, attacked: dict[str, Path], card: BaseCard, shared: Registry
) -> None:
    before = len(shared.list())
    check_refusal(lambda: shared.push(attacked[attack.name], "a", base=card), attack)
    assert len(shared.list()) == before


@by_name([attack for attack in ATTACKS if not attack.only_at_push])
def test_a_server_refuses(
    attack: Attack, attacked: dict[str, Path], honest: Path, card: BaseCard
) -> None:
    """It is the same whether or not its worker has just found the honest one right."""
    layouts, buffer = Layouts(), ReadBuffer()

    def load(folder: Path, layouts: Layouts | None) -> None:
        load_adapter(
            folder,
            card,
            modules=frozenset(card.modules),
            max_rank=512,
            file=TensorBytes(None, buffer),
            layouts=layouts,
        )

    load(honest, layouts)
    for known in (None, layouts):
        check_refusal(lambda known=known: load(attacked[attack.name], known), attack)  # type: ignore[misc]


@by_name([attack for attack in ATTACKS if attack.kind in ("header", "values", "keys", "config")])
def test_damaged_blobs_are_not_pulled(
    attack: Attack, attacked: dict[str, Path], shared: Registry, tmp_path: Path
) -> None:
    """Somebody writes the attack's bytes over those of an honest version."""
    kept = shared.fetch(shared.resolve("honest"))
    name = CONFIG_FILE if attack.kind == "config" else TENSORS_FILE
    hostile = (attacked[attack.name] / name).read_bytes()
    right = (kept / name).read_bytes()
    (kept / name).chmod(0o644)
    (kept / name).write_bytes(hostile)
    with pytest.raises(CorruptArtifact, match=r"its manifest says|digest"):
        shared.pull("honest", tmp_path / "pulled")
    (kept / name).write_bytes(right)
    assert not (tmp_path / "pulled").exists()


@by_name(AT_A_PULL)
def test_a_forged_version_is_not_pulled(
    attack: Attack, attacked: dict[str, Path], shared: Registry, tmp_path: Path
) -> None:
    """All digests are right, because whoever forged the registry computed them."""
    with pytest.raises((CorruptArtifact, IncompatibleAdapter)) as caught:
        pull_forged(shared, attacked[attack.name], tmp_path / "pulled")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "pulled").exists()


def pull_forged(registry: Registry, folder: Path, dest: Path) -> None:
    """Keep ``folder`` as it is, by the store's own means, and pull it."""
    draft = registry.manifest(registry.resolve("honest"))
    store = LocalStore(local_path(registry.url))
    with store.staging() as staged:
        entries = []
        for file in sorted(folder.rglob("*")):
            relative = file.relative_to(folder).as_posix()
            if file.is_dir() or relative == "manifest.json":
                continue
            if not file.is_file():
                raise CorruptArtifact("a link or a device cannot be kept as a blob")
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            entries.append(FileEntry(path=relative, size=len(content), sha256=digest))
            (staged / relative).parent.mkdir(exist_ok=True)
            (staged / relative).write_bytes(content)
        digest = f"sha256:{hashlib.sha256(folder.name.encode()).hexdigest()}"
        forged = dataclasses.replace(draft, name="forged", files=tuple(entries), digest=digest)
        store.commit("forged", staged, forged)
    registry.pull("forged", dest)


@pytest.mark.parametrize("what", HOSTILE_NAMES)
def test_a_hostile_name_is_no_name(what: str, registry: Registry, tmp_path: Path) -> None:
    name = HOSTILE_NAMES[what]
    with pytest.raises(InvalidRef) as caught:
        check_name(name)
    assert str(caught.value).isprintable()
    with pytest.raises(InvalidRef):
        registry.resolve(name)


def test_any_loader_can_be_tried(card: BaseCard, tiny_base: Path, tmp_path: Path) -> None:
    """One that takes all is wrong about every attack, one that takes none about the honest one."""
    outcomes = [*run_against(lambda folder: None, card, tmp_path / "takes-all")]
    assert [o.attack is None for o in outcomes if o.is_right] == [True]
    refused = tmp_path / "takes-none"
    command = [sys.executable, "-m", "lorary.registry", "poison", str(refused)]
    done = subprocess.run(
        [*command, "--base", str(tiny_base), "--against", "false {}", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    wrong = [row["name"] for row in json.loads(done.stdout) if not row["is_right"]]
    assert wrong == ["honest"]
    assert len(json.loads((refused / "attacks.json").read_text())) == len(ATTACKS)
