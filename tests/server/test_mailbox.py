"""One reader, in order, and nothing lost when it is cancelled."""

from __future__ import annotations

import asyncio

import pytest

from lorary.server.mailbox import Mailbox


def test_items_come_in_order_whether_or_not_somebody_waits() -> None:
    async def run() -> list[int]:
        box: Mailbox[int] = Mailbox()
        box.put(1)
        box.put(2)
        got = [await box.get(), await box.get()]
        reader = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        box.put(3)
        box.put(4)
        return [*got, await reader, await box.get()]

    assert asyncio.run(run()) == [1, 2, 3, 4]


@pytest.mark.parametrize("is_put", [False, True])
def test_a_reader_that_is_cancelled_takes_nothing(is_put: bool) -> None:
    async def run() -> int:
        box: Mailbox[int] = Mailbox()
        reader = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        if is_put:
            box.put(1)  # it has been woken, and has not run yet
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        if not is_put:
            box.put(1)
        return await box.get()

    assert asyncio.run(run()) == 1


def test_what_is_put_quietly_waits_for_whoever_wakes_the_reader() -> None:
    async def run() -> list[int]:
        box: Mailbox[int] = Mailbox()
        reader = asyncio.create_task(box.get_all())
        await asyncio.sleep(0)
        box.wake()
        box.put_quietly(1)
        box.put_quietly(2)
        await asyncio.sleep(0)
        assert not reader.done()
        assert len(box) == 2
        box.wake()
        return await reader

    assert asyncio.run(run()) == [1, 2]


def test_a_reader_of_all_that_is_cancelled_takes_nothing() -> None:
    async def run() -> list[int]:
        box: Mailbox[int] = Mailbox()
        reader = asyncio.create_task(box.get_all())
        await asyncio.sleep(0)
        box.put(1)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        box.put(2)
        return await box.get_all()

    assert asyncio.run(run()) == [1, 2]


async def test_a_busy_reader_finds_only_what_is_due() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put(1)
    mailbox.put_quietly(2)
    assert await mailbox.get_all() == [1, 2]
    mailbox.put_quietly(3)
    reading = asyncio.ensure_future(mailbox.get_all())
    await asyncio.sleep(0)
    assert not reading.done()
    mailbox.put_quietly(4)
    mailbox.wake()
    assert await reading == [3, 4]
