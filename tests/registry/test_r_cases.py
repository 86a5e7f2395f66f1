"""What happens to a registry when something goes wrong, case by case, each with its exit code.

R1 kills (here, test_registry_races.py, test_linearizable.py) · R2 races · R3 the same twice · R4 broken
pulls · R5 files that may not be there · R6 no base, another base · R7 a Hub's answers (also
test_hub_store.py) · R9 damaged files (also test_fsck.py) · R10 signatures (test_signatures.py) · R11 places that
cannot be written.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.registry import Registry
from lorary.registry.cli import app
from lorary.registry.cli_support import exit_code_of
from tests.registry.test_hub_store import answering

if TYPE_CHECKING:
    from tests.registry.conftest import Forge


class House:
    """A registry with ``a@1`` and ``a@2`` (``prod``), and the command to use it with."""

    def __init__(self, forge: Forge, base: Path, root: Path, scratch: Path) -> None:
        self.forge, self.base, self.root, self.scratch = forge, base, root, scratch
        registry = Registry.open(root, create=True)
        for seed in (1, 2):
            folder = forge.folder(f"house-{seed}", seed=seed)
            registry.push(folder, "a", base=forge.card, aliases=["prod"])
        self.first = forge.root / "house-1"

    def registry(self) -> Registry:
        return Registry.open(self.root)

    def run(self, *args: object) -> int:
        """Run the command in this process and return its exit code."""
        words = [*map(str, args), "--registry", self.root.as_uri()]
        return exit_code_of(lambda: app(words, prog_name="registry", standalone_mode=False))

    def push(self, folder: Path, name: str = "a") -> int:
        return self.run("push", folder, name, "--base", self.base)

    def blob(self, version: int) -> Path:
        registry = self.registry()
        manifest = registry.manifest(registry.resolve(f"a@{version}"))
        sha256 = next(e.sha256 for e in manifest.files if e.path.endswith(".safetensors"))
        return self.root / "blobs" / "sha256" / sha256[:2] / sha256

    def state(self) -> object:
        """Everything that readers see."""
        registry = self.registry()
        return registry.list(), registry.log("a"), registry.aliases("a")


@pytest.fixture
def house(forge: Forge, tiny_base: Path, tmp_path: Path) -> House:
    return House(forge, tiny_base, tmp_path / "registry", tmp_path)


def r2_a_move_that_somebody_was_before(house: House) -> int:
    return house.run("alias", "a", "prod", "1", "--expect", "1")


def r3_the_same_content_twice(house: House) -> int:
    return house.push(house.first)


def r4_wrong_bytes(house: House) -> int:
    blob = house.blob(1)
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    code = house.run("pull", "a@1", house.scratch / "out")
    assert not (house.scratch / "out").exists()
    assert list(house.scratch.glob(".out*")) == []
    blob.unlink()
    assert house.registry().fsck().damage
    source = next(house.forge.root.glob("house-1"))
    assert house.push(source) == 0  # heals it
    return code


def r4_a_pull_into_a_full_folder(house: House) -> int:
    return house.run("pull", "a@1", house.first)


def with_file(make: Callable[[Path], None]) -> Callable[[House], int]:
    def case(house: House) -> int:
        folder = house.forge.folder("with-file", seed=9)
        make(folder)
        return house.push(folder)

    return case


def zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "README.md", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 20))


def hard_link(folder: Path) -> None:
    (folder.parent / "private").write_text("secret")
    os.link(folder.parent / "private", folder / "README.md")


def setuid(folder: Path) -> None:
    (folder / "README.md").write_text("x")
    (folder / "README.md").chmod(0o4755)


def link(folder: Path) -> None:
    (folder / "README.md").symlink_to("/etc/passwd")


def r6_no_base_is_named(house: House) -> int:
    folder = house.forge.folder("no-base", seed=9)
    (folder / "manifest.json").unlink()
    return house.run("push", folder, "a")


def r6_another_base(house: House) -> int:
    other = house.scratch / "other-base"
    shutil.copytree(house.base, other)
    (other / ".lorary-card.json").unlink(missing_ok=True)
    config = json.loads((other / "config.json").read_text()) | {"rope_theta": 77.0}
    (other / "config.json").write_text(json.dumps(config))
    folder = house.forge.folder("other", seed=9)
    return house.run("push", folder, "a", "--base", other)


def r9_a_damaged_version_file(house: House) -> int:
    file = house.root / "adapters" / "a" / "versions" / "1.json"
    whole = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(whole[:50])
    codes = [house.run("show", "a@1"), house.run("verify"), house.run("fsck")]
    assert codes == [5, 5, 5]
    assert house.run("fsck", "--repair") == 0
    assert file.read_bytes() == whole
    return codes[0]


def r9_a_damaged_alias_log(house: House) -> int:
    file = house.root / "adapters" / "a" / "aliases.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b"?" + whole)
    codes = [house.run("show", "a@prod"), house.run("log", "a"), house.run("fsck")]
    assert codes == [5, 5, 5]
    file.write_bytes(whole)
    return codes[0]


def r11_no_locks(house: House) -> int:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        return house.push(house.forge.folder("new", seed=9))


def r11_no_hard_links(house: House) -> int:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "link", refuse)
        return house.push(house.forge.folder("new", seed=9))


def r11_no_such_place(house: House) -> int:
    return exit_code_of(
        lambda: app(["list", "--registry", "/nowhere/at/all"], standalone_mode=False)
    )


CASES: list[tuple[str, int, Callable[[House], int]]] = [
    ("R2 somebody moved it first", 4, r2_a_move_that_somebody_was_before),
    ("R3 the same content twice", 0, r3_the_same_content_twice),
    ("R4 wrong bytes", 5, r4_wrong_bytes),
    ("R4 the folder is not empty", 4, r4_a_pull_into_a_full_folder),
    *(
        (f"R5 {name}", 5, with_file(lambda folder, n=name: (folder / n).write_bytes(b"x") and None))  # type: ignore[misc]
        for name in ("adapter_model.bin", "adapter_model.pt", "setup.py", "x.safetensors")
    ),
    ("R5 a zip bomb by another name", 5, with_file(zip_bomb)),
    ("R5 a symbolic link", 5, with_file(link)),
    ("R5 a hard link", 5, with_file(hard_link)),
    ("R5 the set-user bit", 5, with_file(setuid)),
    ("R6 no base is named", 2, r6_no_base_is_named),
    ("R6 another base", 9, r6_another_base),
    ("R9 a damaged version file", 5, r9_a_damaged_version_file),
    ("R9 a damaged alias log", 5, r9_a_damaged_alias_log),
    ("R11 no locks", 8, r11_no_locks),
    ("R11 no hard links", 8, r11_no_hard_links),
    ("R11 no such place", 8, r11_no_such_place),
]


@pytest.mark.parametrize(("code", "case"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_case(
    code: int,
    case: Callable[[House], int],
    house: House,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = house.state()
    assert case(house) == code, capsys.readouterr().err
    assert house.state() == before
    assert house.registry().fsck(grace_s=0).is_ok
    said = capsys.readouterr().err
    assert "Traceback" not in said


NAMES = {
    "leaves the folder": "../x",
    "leaves it deep inside": "a/../../x",
    "a path": "/etc/passwd",
    "NUL": "a\0b",
    "300 characters": "a" * 300,
    "Cyrillic a": "\u0430",
    "fullwidth a": "\uff41",
    "dotless i": "pr\u0131me",
    "a zero-width space": "a\u200bb",
    "right to left": "a\u202eb",
    "Windows": "a\\b",
    "hidden": ".a",
    "percent": "a%2Fb",
    "trailing dot": "a.",
    "trailing newline": "a\n",
    "empty": "",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_that_may_not_be(name: str, house: House, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(house.scratch.rglob("*"))
    new = house.first
    for args in (
        ("push", new, name, "--base", house.base),
        ("pull", name, house.scratch / "out"),
        ("show", name),
        ("log", name),
        ("audit", name),
        ("alias", name, "prod", "1"),
        ("alias", "a", name or " ", "1"),
        ("rollback", name, "prod"),
        ("promote", f"{name}@1", "prod"),
        ("promote", f"a@{name}", "prod"),
    ):
        assert house.run(*args) == 2, (args, capsys.readouterr().err)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.isprintable() or said.replace("\n", "").isprintable()  # shown escaped
    assert sorted(house.scratch.rglob("*")) == files


@pytest.mark.parametrize(
    ("status", "code"), [(401, 7), (404, 3), (429, 6), (500, 6), (503, 6)], ids=str
)
def test_r7_what_a_hub_answers(
    status: int, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tests.registry.conftest import use_hub

    headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {"Retry-After": "1"}
    with answering(status, headers=headers) as address:
        use_hub(monkeypatch, address, tmp_path / "home")
        words = ["show", "a", "--registry", "hf://acme"]
        assert exit_code_of(lambda: app(words, standalone_mode=False)) == code


# Argument: root, base, folder. The kernel itself refuses to write past some size, at every size.
FULL = """
import resource, signal, sys
from pathlib import Path
from lorary.registry.cli import app
from lorary.registry.cli_support import exit_code_of

root, base, folder, limit = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
words = ["push", folder, "a", "--base", base, "--alias", "prod", "--registry", root]
sys.exit(exit_code_of(lambda: app(words, standalone_mode=False)))
"""


def test_no_room_at_any_size(house: House) -> None:
    before = house.state()
    folder = house.forge.folder("new", seed=9)
    for limit in (1, 400, 2000):  # the configuration, the tensors, the alias log
        done = subprocess.run(
            [sys.executable, "-c", FULL, str(house.root), str(house.base), str(folder), str(limit)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 8, (limit, done.stderr)
        assert "File too large" in done.stderr
        assert done.stderr.count("\n") == 1
        assert house.state() == before
        assert house.registry().fsck(grace_s=0).is_ok
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert house.push(folder) == 0


# Dies at the n-th call that changes the disk, for every n; then looks, and does the same again.
EVERY_STEP = """
import functools, os, shutil, signal, sys
from pathlib import Path
from lorary.registry import Registry

root, scratch, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
left = 0

def counted(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

names = ("link", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod", "truncate",
         "open", "ftruncate")

def damage(registry):
    (registry.fetch(registry.resolve("a@2")) / "adapter_config.json").unlink()
    (root / "adapters" / "a" / "versions" / "1.json").unlink()

def act(registry):
    if what == "move":
        registry.set_alias("a", "prod", 1, reason="test")
    elif what == "rollback":
        registry.rollback("a", "prod", reason="test")
    elif what == "pull":
        registry.pull("a@2", scratch / "out")
    else:
        registry.fsck(repair=True, grace_s=0)

steps = 0
while True:
    steps += 1
    if what == "fsck":
        damage(Registry.open(root))
    before = Registry.open(root).aliases("a")["prod"] if what != "fsck" else 2
    child = os.fork()
    if child == 0:
        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        left = steps
        act(Registry.open(root))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    seen = Registry.open(root)
    if what == "fsck":
        assert seen.fsck(repair=True).is_ok, steps
    report = seen.fsck()
    assert report.is_ok, (steps, report)
    after = seen.aliases("a")["prod"]
    assert after in (1, 2), (steps, after)
    moves = seen.log("a", "prod")
    assert moves[-1].to_version == after
    out = scratch / "out"
    if out.exists():
        assert {p.name for p in out.iterdir()} >= {"adapter_model.safetensors", "manifest.json"}
        assert what == "pull"
        shutil.rmtree(out)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    if what != "rollback" or after == before:
        act(seen)  # the same again, to the end
    if what in ("move", "rollback"):
        seen.set_alias("a", "prod", 2, reason="back")
    shutil.rmtree(out, ignore_errors=True)
Registry.open(root).fsck(repair=True, grace_s=0)
assert Registry.open(root).fsck(grace_s=0).findings == ()
print(steps)
"""


@pytest.mark.parametrize(
    ("what", "least"), [("move", 4), ("rollback", 4), ("pull", 5), ("fsck", 8)]
)
def test_r1_killed_at_every_step(house: House, what: str, least: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVERY_STEP, str(house.root), str(house.scratch), what],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= least


def test_r4_a_pull_that_is_interrupted_leaves_nothing_and_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    out = house.scratch / "out"
    with monkeypatch.context() as patched:
        patched.setattr("lorary.registry.pull.copy_file", interrupt)
        assert house.run("pull", "a@2", out) == 130
    assert not out.exists()
    assert list(house.scratch.glob(".out*")) == []
    assert house.run("pull", "a@2", out) == 0
