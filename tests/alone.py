"""Tests of the marker ``alone`` (they measure time or processor use) run while no other test does.

Where several processes run tests (``pytest -n``), everybody holds a lock from before a test's fixtures are
set up until they are gone: shared, or, for a test that must be alone, exclusive. Nobody takes it without
passing a gate, which the one who waits to be alone keeps closed; so its turn comes.
"""

from __future__ import annotations

import fcntl
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run one test within the lock."""
    with ExitStack() as stack:
        if hasattr(item.config, "workerinput"):  # one of several processes
            folder = Path(item.config.getoption("basetemp")).parent
            is_alone = item.get_closest_marker("alone") is not None
            with _locked(folder / "gate", fcntl.LOCK_EX):
                how = fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH
                stack.enter_context(_locked(folder / "run", how))
        return (yield)


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield
