"""A thread's number of threads is its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from lorary.server.maths_threads import use_threads

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
