"""Call the server with every held-out item of every task and with the bare base, all mixed."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorary.client import AsyncClient, Message, ServerInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorary.client import Receipt

CallKind = Literal["generate", "classify", "base"]
BASE_TOKENS = 24
"""Length of the bare base's answers, which have no end of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request: a task's held-out item, for its adapter or for the bare base."""

    task: str
    index: int
    kind: CallKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back, and how long the caller waited."""

    call: Call
    text: str
    seconds: float
    num_tokens: int
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """All answers, in the order of the calls, with the server's own account of its steps."""

    answers: tuple[Answer, ...]
    seconds: float
    info: ServerInfo


def plan_calls(
    texts: Mapping[str, Sequence[str]], with_labels: set[str], num_base: int
) -> list[Call]:
    """Return every call, shuffled, always in the same order.

    Args:
        texts: task to its held-out texts.
        with_labels: tasks whose items are classified as well as answered.
        num_base: how many items of each task the bare base is asked, too.
    """
    calls = []
    for task, items in texts.items():
        for index, text in enumerate(items):
            calls.append(Call(task=task, index=index, kind="generate", text=text))
            if task in with_labels:
                calls.append(Call(task=task, index=index, kind="classify", text=text))
            if index < num_base:
                calls.append(Call(task=task, index=index, kind="base", text=text))
    random.Random(0).shuffle(calls)
    return calls


async def ask_all(
    address: str,
    calls: Sequence[Call],
    *,
    alias: str,
    concurrency: int,
    advance: Callable[[], None],
) -> Session:
    """Send every call, ``concurrency`` at a time.

    Raises:
        LoraryError: the first call that the server refused; the others are cancelled.
    """
    gate = asyncio.Semaphore(concurrency)
    async with AsyncClient(address, timeout_s=600.0) as client:
        await client.wait_until_ready()
        started = time.monotonic()

        async def ask(call: Call) -> Answer:
            async with gate:
                answer = await _ask(client, call, alias)
            advance()
            return answer

        tasks = [asyncio.ensure_future(ask(call)) for call in calls]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        seconds = time.monotonic() - started
        return Session(answers=tuple(answers), seconds=seconds, info=await client.server_info())


async def _ask(client: AsyncClient, call: Call, alias: str) -> Answer:
    started = time.monotonic()
    adapter = f"{call.task}@{alias}"
    if call.kind == "classify":
        scored = await client.classify(call.text, adapter=adapter)
        text, num_tokens, receipt = scored.label, 0, scored.receipt
    else:
        if call.kind == "base":
            message: Message = {"role": "user", "content": call.text}
            result = await client.generate(messages=[message], max_tokens=BASE_TOKENS)
        else:
            result = await client.generate(call.text, adapter=adapter)
        text, num_tokens, receipt = result.text, result.usage.completion_tokens, result.receipt
    return Answer(
        call=call,
        text=text.strip(),
        seconds=time.monotonic() - started,
        num_tokens=num_tokens,
        receipt=receipt,
    )
