"""``lorary chat``: talk to an adapter in a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli.call import TargetOption
from lorary.client import Client, GenerateResult
from lorary.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from lorary.errors import InvalidRequest, LoraryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorary.client import Message, SamplingOptions

app = typer.Typer(name="chat", add_completion=False, pretty_exceptions_enable=False)

HELP = """\
/adapter REF   go on with another adapter; without REF with the bare base
/system TEXT   tell the model what it is; begins anew
/undo          take the last question and answer back
/new           begin anew
/quit          leave, as Ctrl-D does"""


class Conversation:
    """What was said, and to whom the next word goes.

    Args:
        client: of the server.
        adapter: ref of the adapter; empty is the bare base.
        system: the system message; empty is none.
        max_tokens: most tokens of an answer; None is the adapter's default.
        temperature: None is the server's default.
    """

    def __init__(
        self,
        client: Client,
        adapter: str,
        *,
        system: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._temperature = temperature
        self.adapter = adapter
        self.system = system
        self.turns: list[Message] = []

    def begin(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns.clear()

    def undo(self) -> None:
        """Forget the last question and its answer."""
        del self.turns[-2:]

    def ask(self, text: str) -> Iterator[str | GenerateResult]:
        """Yield the answer as it comes, then the whole; only a whole answer is remembered."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        question: Message = {"role": "user", "content": text}
        for event in self._client.stream(
            messages=[*first, *self.turns, question],
            adapter=self.adapter,
            **_given(max_tokens=self._max_tokens, temperature=self._temperature),
        ):
            if isinstance(event, GenerateResult):
                self.turns += [question, {"role": "assistant", "content": event.text}]
                yield event
            else:
                yield event.text


@app.command(epilog="Example: lorary chat support@prod --system 'Answer in one sentence.'")
def chat(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="name, name@prod …; left out: the bare base.")
    ] = "",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    target: TargetOption = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = DEFAULT_TIMEOUT_S,
) -> None:
    """Talk to an adapter, with the base's chat template; /help says what else there is.

    Ctrl-C stops an answer. Without a terminal each line of standard input is a question.
    """
    is_terminal = sys.stdin.isatty()
    with Client(target, timeout_s=timeout) as client:
        info = client.server_info()
        conversation = Conversation(
            client, adapter, system=system, max_tokens=max_tokens, temperature=temperature
        )
        if is_terminal:
            typer.echo(f"{info.base} at {target}; /help helps, Ctrl-D leaves", err=True)
        for line in _lines(conversation, is_terminal=is_terminal):
            try:
                if line.startswith("/"):
                    if not _command(conversation, line):
                        return
                else:
                    _answer(conversation, line)
            except LoraryError as error:
                if not is_terminal:
                    raise
                # A question that fails is not the end of a conversation.
                typer.echo(f"error: {error}", err=True)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                typer.echo("\n(stopped; the question and its answer are forgotten)", err=True)


def _lines(conversation: Conversation, *, is_terminal: bool) -> Iterator[str]:
    """Yield what is typed, line by line, without empty ones."""
    if is_terminal:
        import readline  # noqa: F401 - gives input() its line editing and history
    while True:
        try:
            prompt = f"{conversation.adapter or 'base'}> " if is_terminal else ""
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            typer.echo("\n(Ctrl-D leaves)", err=True)
            continue
        if line:
            yield line


def _command(conversation: Conversation, line: str) -> bool:
    """Do what a line with a slash says; False ends the conversation."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/quit" | "/exit":
            return False
        case "/help":
            typer.echo(HELP, err=True)
        case "/adapter":
            conversation.adapter = rest
        case "/system":
            conversation.system = rest
            conversation.begin()
        case "/undo":
            conversation.undo()
        case "/new":
            conversation.begin()
        case _:
            raise InvalidRequest(f"'{name}' is no command; /help lists them.")
    return True


def _answer(conversation: Conversation, text: str) -> None:
    started = time.perf_counter()
    first_s: float | None = None
    for event in conversation.ask(text):
        if isinstance(event, str):
            if first_s is None:
                first_s = time.perf_counter() - started
            typer.echo(event, nl=False)
            sys.stdout.flush()
            continue
        typer.echo()
        seconds = time.perf_counter() - started
        tokens, receipt = event.usage.completion_tokens, event.receipt
        who = f"{receipt.name}@{receipt.version}" if receipt.name else "base"
        why = "" if event.finish_reason == "stop" else ", cut off"
        typer.echo(
            f"[{who} · {tokens} tokens · {tokens / max(seconds, 1e-9):.0f} tokens/s · first after "
            f"{1e3 * (first_s or seconds):.0f} ms · {event.usage.cached_tokens} of "
            f"{event.usage.prompt_tokens} prompt tokens reused{why}]",
            err=True,
        )


def _given(*, max_tokens: int | None, temperature: float | None) -> SamplingOptions:
    options: SamplingOptions = {}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    return options
