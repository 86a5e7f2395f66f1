"""Calls to a server on this machine that streams server-sent events, one JSON object each."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

from benchmarks.harness.threads import all_cores
from benchmarks.workload import Call, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HOST = "127.0.0.1"
TIMEOUT_S = 900.0
_EVENT = b"data: "
_END = b"[DONE]"


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_healthy(port: int) -> bool:
    """Return whether ``/health`` says that the server is ready."""
    connection = HTTPConnection(HOST, port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def ask_all(
    port: int,
    path: str,
    calls: Sequence[Call],
    *,
    concurrency: int,
    body: Callable[[Call], dict[str, Any]],
    take: Callable[[dict[str, Any], Trace], Sequence[int]],
) -> list[Trace]:
    """Let ``concurrency`` callers share the calls; each sends one after the other.

    Args:
        port: of the server.
        path: what is posted to.
        calls: what is asked.
        concurrency: how many callers.
        body: makes a call's JSON body.
        take: returns the tokens that an event brings; is given the trace before they are added.

    Raises:
        OSError: the connection broke, as it does when the server dies.
        HTTPException: the same, in the middle of an answer.
        RuntimeError: the server refused a call, or reported an error in its stream.
    """
    waiting = iter(enumerate(calls))
    lock = threading.Lock()
    has_failed = threading.Event()
    traces = [Trace(0.0) for _ in calls]

    def caller() -> None:
        try:
            while not has_failed.is_set():
                with lock:
                    index, call = next(waiting, (-1, None))
                if call is None:
                    return
                content = json.dumps(body(call))
                traces[index].sent_s = time.perf_counter()
                # A connection of its own for every call: servers close one after so many.
                connection = HTTPConnection(HOST, port, timeout=TIMEOUT_S)
                try:
                    _ask(connection, path, content, traces[index], take)
                finally:
                    connection.close()
        except BaseException:
            has_failed.set()
            raise

    # OpenMP has bound this thread to one core, and threads inherit that.
    with all_cores(), ThreadPoolExecutor(concurrency) as pool:
        for caller_done in [pool.submit(caller) for _ in range(min(concurrency, len(calls)))]:
            caller_done.result()
    return traces


def _ask(
    connection: HTTPConnection,
    path: str,
    content: str,
    trace: Trace,
    take: Callable[[dict[str, Any], Trace], Sequence[int]],
) -> None:
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        said = response.read().decode(errors="replace")
        raise RuntimeError(f"POST {path}: HTTP {response.status}: {said[:500]}")
    for line in response:
        if not line.startswith(_EVENT) or line.startswith(_EVENT + _END):
            continue
        at_s = time.perf_counter()
        event = json.loads(line[len(_EVENT) :])
        if "error" in event:
            raise RuntimeError(f"POST {path}: {event['error']}")
        tokens = take(event, trace)
        trace.token_ids += tokens
        trace.token_s += [at_s] * len(tokens)
