"""Frames that carry several steps' tokens: when streams are joined, what stays at once, and that nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lorary.errors import EngineFailed
from lorary.server.calls import Calls
from lorary.server.engine.request import Output, PositionLogprobs
from lorary.server.frames import LONGEST_S, WINDOW_S, Frames, joined
from lorary.server.mailbox import Mailbox

FINISH: Any = object()


class Clock:
    """A loop's time and its one timer, in a test's hands."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timer: tuple[float, Any] | None = None

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, callback: Any, *arguments: Any) -> Any:
        assert self.timer is None, "one at a time"
        self.timer = (when_s, lambda: callback(*arguments))
        return self.timer

    def sleep(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.timer is not None and self.timer[0] <= until_s:
            (self.now_s, callback), self.timer = self.timer, None
            callback()
        self.now_s = until_s


class Woken(Mailbox[Output]):
    """A mailbox whose reader reads whenever it is woken, and what it found each time."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[list[Output]] = []

    def wake(self) -> None:
        if self._items:
            self.frames.append([*self._items])
            self._items.clear()

    @property
    def sizes(self) -> list[int]:
        return [len(frame) for frame in self.frames]


def streams(count: int) -> list[Woken]:
    return [Woken() for _ in range(count)]


def token(n: int, **more: Any) -> Output:
    return Output("r", 0, f"{n} ", [n], **more)


def run(
    frames: Frames, clock: Clock, asked: list[Woken], steps: int, step_s: float, first: int = 0
) -> None:
    loop: Any = clock
    for n in range(first, first + steps):
        frames.hand_over([(stream, token(n)) for stream in asked], loop)
        clock.sleep(step_s)


def test_a_few_streams_have_a_frame_for_every_token() -> None:
    frames, clock, asked = Frames(1000), Clock(), streams(9)
    run(frames, clock, asked, 200, 0.01)
    assert frames.steps == 1
    assert all(stream.sizes == [1] * 200 for stream in asked)
    assert clock.timer is None


def test_many_streams_are_joined_and_none_loses_a_token_or_waits_for_its_first() -> None:
    """256 streams of 30 tokens a second: 7,680, and 4,000 frames are allowed."""
    frames, clock, asked = Frames(4000), Clock(), streams(256)
    run(frames, clock, asked, 30, 1 / 30)
    assert frames.steps == 2
    before = [len(stream.frames) for stream in asked]
    run(frames, clock, asked, 60, 1 / 30, first=30)
    assert all(
        len(s.frames) - count in (29, 30, 31) for s, count in zip(asked, before, strict=True)
    )
    (late,) = streams(1)
    run(frames, clock, [*asked, late], 1, 1 / 30, first=90)
    assert late.sizes == [1]
    clock.sleep(LONGEST_S)
    for stream in asked:
        assert [o.token_ids[0] for frame in stream.frames for o in frame] == list(range(91))


def test_they_are_apart_again_when_fewer_are_left() -> None:
    frames, clock, asked = Frames(100), Clock(), streams(50)
    run(frames, clock, asked, 100, 0.01)
    assert frames.steps == 50
    few = asked[:1]
    run(frames, clock, few, 100, 0.02, first=100)
    assert frames.steps == 1
    assert few[0].sizes[-50:] == [1] * 50
    assert sum(few[0].sizes) == 200


def test_no_token_waits_longer_than_a_tenth_of_a_second() -> None:
    """However many steps would be joined, and if none follows at all."""
    frames, clock, asked = Frames(1), Clock(), streams(4)
    run(frames, clock, asked, 40, 0.02)
    assert frames.steps > LONGEST_S / 0.02
    assert max(asked[0].sizes) <= LONGEST_S / 0.02 + 1
    clock.sleep(LONGEST_S)
    assert sum(asked[0].sizes) == 40


def test_an_end_and_an_error_leave_at_once_with_what_waited() -> None:
    loop: Any
    frames, clock, asked = Frames(10), Clock(), streams(20)
    loop = clock
    run(frames, clock, asked, 60, 0.01)
    assert frames.steps > 2
    ended, failed = asked[:2]
    clock.sleep(LONGEST_S)
    frames.hand_over([(s, token(60)) for s in asked], loop)
    counts = len(ended.frames), len(failed.frames)
    frames.hand_over(
        [
            (ended, token(61, finish=FINISH)),
            (failed, Output("r", 0, error=EngineFailed("it failed"))),
        ],
        loop,
    )
    assert (len(ended.frames), len(failed.frames)) == (counts[0] + 1, counts[1] + 1)
    assert [o.token_ids for o in ended.frames[-1]] == [[60], [61]]


def test_none_are_joined_where_that_is_switched_off() -> None:
    frames, clock, asked = Frames(0), Clock(), streams(300)
    run(frames, clock, asked, 100, 0.001)
    assert all(stream.sizes == [1] * 100 for stream in asked)


def test_the_pace_is_the_last_moments() -> None:
    """A pause is no pace, and the first step after one is not joined."""
    frames, clock, asked = Frames(1000), Clock(), streams(100)
    run(frames, clock, asked, 100, 0.01)
    assert frames.steps == 10
    clock.sleep(60)
    run(frames, clock, asked, 1, 0.01, first=100)
    assert frames.steps == 1
    assert asked[0].frames[-1][-1].token_ids == [100]
    assert WINDOW_S < 1


def parts_of(outputs: list[Output], index: int) -> tuple[str, list[int], int, Any]:
    own = [o for o in outputs if o.index == index]
    return (
        "".join(o.text for o in own),
        [t for o in own for t in o.token_ids],
        sum(len(o.logprobs) for o in own),
        own[-1].finish if own else None,
    )


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), max_size=3)), min_size=1))
def test_joined_answers_say_what_their_steps_said(steps: list[tuple[int, list[int]]]) -> None:
    outputs = [
        Output(
            "r",
            index,
            "".join(map(str, ids)),
            ids,
            tuple(PositionLogprobs(chosen=(i, -1.0)) for i in ids),
        )
        for index, ids in steps
    ]
    outputs[-1].finish = FINISH
    before = [parts_of([o], o.index) for o in outputs]
    found = joined(outputs)
    assert [o.index for o in found] == list(dict.fromkeys(index for index, _ in steps))
    for index in range(3):
        assert parts_of(found, index) == parts_of(outputs, index)
    assert [parts_of([o], o.index) for o in outputs] == before


def test_an_error_comes_after_what_came_before_it_and_ends_the_call() -> None:
    error = EngineFailed("it failed")
    found = joined([token(1), token(2), Output("r", 0, error=error), token(3)])
    assert [o.token_ids for o in found] == [[1, 2], []]
    assert found[-1].error is error


def test_a_call_joins_what_came_while_its_reader_was_busy() -> None:
    async def read() -> list[list[Output]]:
        calls = Calls(4)
        calls.attach(asyncio.get_running_loop())
        with calls.listening("r") as mailbox:
            for n in range(3):
                await asyncio.to_thread(calls.deliver, [token(n)])
            await asyncio.sleep(0.01)
            return [joined(await mailbox.get_all())]

    ((output,),) = asyncio.run(read())
    assert output.token_ids == [0, 1, 2]
    assert output.text == "0 1 2 "
