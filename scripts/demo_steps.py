"""Steps that are shown, timed, kept, and used again; children that never outlive the demo."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.load import process_tree
from lorary.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

_CHILD_STOP_S = 30.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ChildFailed(Exception):
    """A command of the demo ended with an error, which it has printed itself."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"'{' '.join(command)}' ended with exit code {code}")
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A finished step: what it was made from, how long it took, what it found."""

    name: str
    key: str
    seconds: float
    facts: dict[str, Any]
    reused: bool = False


def content_key(*parts: object) -> str:
    """Return a digest of everything that decides what a step makes."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(slots=True)
class Steps:
    """The steps of one run, in order; finished ones are kept in ``folder``."""

    folder: Path
    console: Console
    total: int
    records: list[StepRecord] = field(default_factory=list)

    def run(
        self,
        name: str,
        key: str,
        work: Callable[[], dict[str, Any]],
        *,
        is_there: Callable[[], bool] = lambda: True,
    ) -> dict[str, Any]:
        """Do a step, or take what an earlier run found with the same key; return its facts.

        Args:
            name: shown to the person, and the record's name.
            key: what it depends on; another key does it again.
            work: does it; what it returns is kept.
            is_there: whether what an earlier run made is still there.
        """
        place = f"[{len(self.records) + 1}/{self.total}]"
        path = self.folder / f"{name.replace(' ', '-')}.json"
        old = _read(path)
        if old is not None and old.key == key and is_there():
            took = _clock(old.seconds)
            self._say(f"[green]✓[/] {place} {name} [dim](done before, in {took})[/]")
            self.records.append(StepRecord(**{**asdict(old), "reused": True}))
            return old.facts
        self._say(f"[bold]▸ {place} {name}[/]")
        started = time.monotonic()
        facts = work()
        record = StepRecord(
            name=name, key=key, seconds=round(time.monotonic() - started, 1), facts=facts
        )
        _write(path, asdict(record))
        self.records.append(record)
        self._say(f"[green]✓[/] {place} {name} [dim]in {_clock(record.seconds)}[/]")
        return facts

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)


def run_child(command: Sequence[str]) -> None:
    """Run a command whose output and progress go to this terminal.

    Raises:
        ChildFailed: it ended with an error.
    """
    # A session of its own: Ctrl-C reaches it through us, once, and it is never left behind.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = child.wait()
    except BaseException:
        _end(child)
        raise
    if code:
        raise ChildFailed(command, code)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder against another demo.

    Raises:
        Conflict: one is running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"another demo is using '{folder}'. Wait for it, or choose another --folder."
            ) from error
        yield


class PeakMemory:
    """Watches the resident memory of this process and all its children, summed, until stopped."""

    def __init__(self, interval_s: float = 0.5) -> None:
        self.bytes = 0
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval_s):
            total = sum(_resident_bytes(pid) for pid in process_tree(os.getpid()))
            self.bytes = max(self.bytes, total)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0  # it has just ended


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask a child's whole session to stop, then make it."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if child.poll() is not None:
            return
        os.killpg(child.pid, number)
        try:
            child.wait(_CHILD_STOP_S)
        except subprocess.TimeoutExpired:
            continue


def _read(path: Path) -> StepRecord | None:
    """Return a kept record; None when there is none, or another version of the demo wrote it."""
    try:
        return StepRecord(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    beside.replace(path)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{seconds:.1f} s"
