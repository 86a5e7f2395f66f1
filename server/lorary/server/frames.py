"""Which steps' tokens leave in one frame of a stream.

A frame costs the doors about 60 µs of processor time whatever it carries, six tenths of it gRPC's own write. With
hundreds of quick streams a frame for every token is most of a core, which the engine's Python wants, too; a few
hundred more, and the doors fall behind for good. So streams together are sent no more than so many frames a
second: above that, each carries what two or more steps have made, and its first token waits for the last one's step.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from lorary.server.engine.request import Output

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from lorary.server.mailbox import Mailbox

LONGEST_S = 0.1
"""No token waits longer for company."""
TIMER_S = 0.001
"""Timers come early by as much as the clock's resolution, which is less."""
WINDOW_S = 0.25
"""Over so long the engine's pace is taken."""


class Frames:
    """Hands steps' outputs to their readers, and says when these should wake; on the event loop.

    Args:
        per_s: frames of all streams in a second, above which steps are joined; 0 joins none.

    Attributes:
        steps: of so many steps a frame carries the tokens now.
    """

    def __init__(self, per_s: int) -> None:
        self.steps = 1
        self._per_s = per_s
        self._count = 0
        self._since_s = 0.0
        # Of each of the last steps its time and the mailboxes whose readers were left asleep.
        self._asleep: deque[tuple[float, list[Mailbox[Output]]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def joins_steps(self) -> bool:
        """Whether it ever joins any."""
        return self._per_s > 0

    def hand_over(
        self,
        outputs: Sequence[tuple[Mailbox[Output], Output]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Put one step's outputs into their mailboxes.

        A stream's first token, its end, and an error wake its reader now.
        """
        now_s = loop.time()
        if self.joins_steps:
            self._follow(len(outputs), now_s)
        if self.steps == 1 and not self._asleep:
            for mailbox, output in outputs:
                mailbox.put(output)
            return
        asleep: list[Mailbox[Output]] = []
        for mailbox, output in outputs:
            if not mailbox.has_begun or output.finish is not None or output.error is not None:
                mailbox.put(output)
                continue
            if not mailbox:
                asleep.append(mailbox)
            mailbox.put_quietly(output)
        self._asleep.append((now_s, asleep))
        while len(self._asleep) >= self.steps:
            self._wake_oldest()
        self._watch(loop)

    def _follow(self, count: int, now_s: float) -> None:
        self._count += count
        passed_s = now_s - self._since_s
        if passed_s >= WINDOW_S:
            self.steps = max(1, math.ceil(self._count / passed_s / self._per_s))
            self._count, self._since_s = 0, now_s

    def _wake_oldest(self) -> None:
        for mailbox in self._asleep.popleft()[1]:
            mailbox.wake()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """See to it that nobody sleeps on if no step follows in time; one timer at a time."""
        if self._asleep and self._timer is None:
            self._timer = loop.call_at(self._asleep[0][0] + LONGEST_S, self._wake_late, loop)

    def _wake_late(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        late_s = loop.time() + TIMER_S - LONGEST_S
        while self._asleep and self._asleep[0][0] <= late_s:
            self._wake_oldest()
        self._watch(loop)


def joined(outputs: list[Output]) -> list[Output]:
    """Join what several steps have made of each answer of a call.

    Args:
        outputs: of one call, in order; they are left as they are.

    Returns:
        One for each answer, in the order in which they come first. An error is the last, for it is the call's end.
    """
    if len(outputs) == 1:
        return outputs
    whole: dict[int, Output] = {}
    for output in outputs:
        if output.error is not None:
            return [*whole.values(), output]
        before = whole.get(output.index)
        if before is None:
            whole[output.index] = output
            continue
        whole[output.index] = Output(
            request_id=output.request_id,
            index=output.index,
            text=before.text + output.text,
            token_ids=before.token_ids + output.token_ids,
            logprobs=before.logprobs + output.logprobs,
            finish=output.finish,
        )
    return [*whole.values()]
