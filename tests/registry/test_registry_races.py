"""Several real processes at one registry, and processes killed at every step of a push."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorary.registry import Registry
from lorary.registry.validate import validate_adapter

if TYPE_CHECKING:
    from tests.registry.conftest import Forge

PROCESSES = {"folder": 8, "hub": 4}


@dataclass(frozen=True)
class Shared:
    """A registry for many processes: its address, and how many of them."""

    url: str
    processes: int


@pytest.fixture(params=PROCESSES)
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Shared:
    """Once in a folder, once on a hub."""
    url = tmp_path.joinpath("shared").as_uri()
    if request.param == "hub":
        url = request.getfixturevalue("hub_url")
    return Shared(url, PROCESSES[request.param])


# Argument: a JSON job. Waits for the start file, so that all begin together.
WORKER = """
import json, sys, time
from pathlib import Path
from lorary.errors import Conflict
from lorary.registry import BaseCard, Registry

job = json.loads(sys.argv[1])
card = BaseCard.from_folder(Path(job["base"]))
registry = Registry.open(job["registry"], create=True)
print("ready", flush=True)
while not Path(job["start"]).exists():
    time.sleep(0.001)
try:
    if job["do"] == "push":
        info = registry.push(Path(job["folder"]), "a", base=card, aliases=job["aliases"])
        print(json.dumps([info.version, info.digest]))
    else:
        registry.set_alias("a", "prod", job["version"], expect=job["expect"])
        print("won")
except Conflict:
    print("lost")
"""


def run_together(jobs: list[dict[str, Any]], start: Path) -> list[str]:
    """Start one process per job, let all go at once, and return what each printed last."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(job | {"start": str(start)})],
            stdout=subprocess.PIPE,
            text=True,
        )
        for job in jobs
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    start.touch()
    said = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(jobs)
    return said


def push_jobs(forge: Forge, base: Path, url: str, seeds: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "do": "push",
            "base": str(base),
            "registry": url,
            "folder": str(forge.folder(f"push-{i}", seed=seed)),
            "aliases": [f"by-{i}"],
        }
        for i, seed in enumerate(seeds)
    ]


def test_concurrent_pushes_get_consecutive_versions(
    forge: Forge, tiny_base: Path, tmp_path: Path, shared: Shared
) -> None:
    jobs = push_jobs(forge, tiny_base, shared.url, list(range(shared.processes)))
    said = [json.loads(line) for line in run_together(jobs, tmp_path / "go")]
    assert sorted(version for version, _ in said) == list(range(1, shared.processes + 1))
    registry = Registry.open(shared.url)
    assert registry.verify().is_ok
    assert {info.version: info.digest for info in registry.list()} == dict(said)
    pushed = {f"by-{i}": version for i, (version, _) in enumerate(said)}
    assert registry.aliases("a") == {"latest": shared.processes, **pushed}
    assert len(registry.log("a")) == shared.processes


def test_concurrent_pushes_of_one_content_are_one_version(
    forge: Forge, tiny_base: Path, tmp_path: Path, shared: Shared
) -> None:
    jobs = push_jobs(forge, tiny_base, shared.url, [7] * shared.processes)
    said = [json.loads(line) for line in run_together(jobs, tmp_path / "go")]
    assert {version for version, _ in said} == {1}
    assert len({digest for _, digest in said}) == 1
    assert len(Registry.open(shared.url).list()) == 1


def test_of_concurrent_moves_exactly_one_wins(
    forge: Forge, tiny_base: Path, tmp_path: Path, shared: Shared
) -> None:
    registry = Registry.open(shared.url, create=True)
    for seed in range(shared.processes + 1):
        registry.push(forge.folder(str(seed), seed=seed), "a", base=forge.card)
    registry.set_alias("a", "prod", 1)
    jobs = [
        {
            "do": "alias",
            "base": str(tiny_base),
            "registry": shared.url,
            "version": version,
            "expect": 1,
        }
        for version in range(2, shared.processes + 2)
    ]
    said = run_together(jobs, tmp_path / "go")
    assert sorted(said) == ["lost"] * (shared.processes - 1) + ["won"]
    registry = Registry.open(shared.url)
    assert registry.aliases("a")["prod"] == said.index("won") + 2
    assert len(registry.log("a")) == 2


# Dies at the n-th call that changes the disk, for every n, and looks at the registry each time.
EVERY_STEP = """
import functools, os, signal, sys
from pathlib import Path
from lorary.registry import BaseCard, Registry

root, base, folder = map(Path, sys.argv[1:])
card = BaseCard.from_folder(base)
registry = Registry.open(root)
registry.push(folder / "first", "a", base=card, aliases=["prod"])
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

names = ("link", "rename", "replace", "fsync", "mkdir", "unlink", "rmdir", "chmod", "truncate")
steps = 0
while True:
    steps += 1
    child = os.fork()
    if child == 0:
        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        left = steps
        Registry.open(root).push(folder / "second", "a", base=card, aliases=["prod"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    seen = Registry.open(root)
    report = seen.verify()
    assert report.is_ok, (steps, report)
    versions = [info.version for info in seen.list()]
    assert versions in ([1], [1, 2]), (steps, versions)
    prod = seen.aliases("a")["prod"]
    assert prod in versions, (steps, prod)
    seen.fetch(seen.resolve("a@prod"))
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
assert versions == [1, 2] and prod == 2
print(steps)
"""


def test_a_push_killed_at_any_step_changes_nothing_and_can_be_repeated(
    forge: Forge, registry: Registry, tiny_base: Path
) -> None:
    forge.folder("first", seed=1)
    forge.folder("second", seed=2)
    root = registry.url.removeprefix("file://")
    done = subprocess.run(
        [sys.executable, "-c", EVERY_STEP, root, str(tiny_base), str(forge.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15  # every link, rename, sync … was a place to die


PUSH_FOR_EVER = """
import sys
from pathlib import Path
from lorary.registry import BaseCard, Registry

root, base, folder = map(Path, sys.argv[1:])
card = BaseCard.from_folder(base)
registry = Registry.open(root)
print("ready", flush=True)
while True:
    for path in sorted(folder.iterdir()):
        registry.push(path, "a", base=card, aliases=["prod"])
"""


def test_pushes_killed_at_random_leave_a_sound_registry(
    forge: Forge, registry: Registry, tiny_base: Path
) -> None:
    for seed in range(6):
        forge.folder(str(seed), seed=seed)
    root = Path(registry.url.removeprefix("file://"))
    chance = random.Random(0)
    known: dict[int, str] = {}
    # A push may not have come far before it is killed: more often, until one was done.
    for done in range(100):
        if done >= 8 and known:
            break
        command = [sys.executable, "-c", PUSH_FOR_EVER, str(root), str(tiny_base), str(forge.root)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.15))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        seen = Registry.open(root)
        assert seen.verify().is_ok
        now = {info.version: info.digest for info in seen.list()}
        assert now.items() >= known.items()  # what was there stays
        assert sorted(now) == list(range(1, len(now) + 1))
        known = now
    assert len(known) >= 1
    info = registry.push(forge.folder("last", seed=99), "a", base=forge.card)
    assert info.version == len(known) + 1
    validate_adapter(registry.fetch(registry.resolve("a")), forge.card)
