"""A thread's number of threads is its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from lorary.server.maths_threads import let_helpers_go, use_threads
from tests.conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """The number of the test's own thread, and the process', as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_thread_keeps_its_number_though_another_sets_its_own_before_it_ever_asked() -> None:
    is_set, may_ask = threading.Event(), threading.Event()

    def engine() -> int:
        use_threads(3)
        is_set.set()
        assert may_ask.wait(60)
        return torch.get_num_threads()

    with (
        ThreadPoolExecutor(1) as engines,
        ThreadPoolExecutor(1, initializer=use_threads, initargs=(1,)) as loads,
    ):
        asked = engines.submit(engine)
        assert is_set.wait(60)
        assert loads.submit(torch.get_num_threads).result() == 1
        may_ask.set()
        assert asked.result(60) == 3


def test_helpers_go_and_come_again() -> None:
    """Idle ones count among those that compete for the cores, and make steps sleep where they should spin."""

    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def compute() -> float:
        return float((torch.ones(1 << 20) * 2).sum())

    use_threads(1)
    compute()
    let_helpers_go()
    alone = num_threads()
    use_threads(3)
    assert compute() == 1 << 21
    assert num_threads() == alone + 2
    let_helpers_go()
    wait_until(lambda: num_threads() == alone)
    assert compute() == 1 << 21
    let_helpers_go()
