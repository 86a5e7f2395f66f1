"""``lorary call``: ask a server from a shell."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorary.client import Client, GenerateResult
from lorary.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from lorary.errors import InvalidRequest
from lorary.registry.cli_support import console, print_json, table

if TYPE_CHECKING:
    from lorary.client import Classification, Receipt

app = typer.Typer(name="call", add_completion=False, pretty_exceptions_enable=False)

TargetOption = Annotated[
    str, typer.Option("--target", envvar="LORARY_TARGET", help="The server's host:port.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(epilog='Example: lorary call sentiment@prod "the film was a delight" --classify')
def call(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="name, name@prod, name@3 …; several with weights: 'a@prod*0.7+b@2*0.3'; '' is the base.",
        ),
    ],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="What to send; '-' reads standard input.")
    ] = "-",
    is_prompt: Annotated[
        bool, typer.Option("--prompt", help="TEXT is a complete prompt, not the template's input.")
    ] = False,
    is_chat: Annotated[
        bool, typer.Option("--chat", help="TEXT is a message to the base's chat template.")
    ] = False,
    classify: Annotated[
        bool, typer.Option("--classify", help="Print the probability of every label.")
    ] = False,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Score this label; may be repeated.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    num_answers: Annotated[int, typer.Option("-n", "--n", min=1, max=16, help="Answers.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus, (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 keeps all.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", help="Answer with one of these; may be repeated."),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer with JSON that fits this schema.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Answer with what this regular expression matches.")
    ] = None,
    lark: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer with a sentence of this grammar.")
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --chat: functions that may be called, a JSON list in OpenAI's form.",
        ),
    ] = None,
    tool_choice: Annotated[
        str | None,
        typer.Option(help="With --tools: auto, none, required, or the name of one."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    priority: Annotated[
        int, typer.Option(help="-10 to 10; higher is served sooner when there is a queue.")
    ] = 0,
    key: Annotated[
        str, typer.Option("--key", help="Who calls: decides whether a canary answers.")
    ] = "",
    execution: Annotated[
        str,
        typer.Option(
            help="batched: beside the base; merged: folded into it, or refused; auto: the server's choice."
        ),
    ] = "auto",
    target: TargetOption = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Send one input to one adapter; the answer goes to stdout, its receipt to stderr."""
    given = _given(_read(text), is_prompt=is_prompt, is_chat=is_chat)
    if (classify or label) and (stream or num_answers > 1):
        raise InvalidRequest("--classify gives one answer at once; leave out --stream and -n.")
    if stream and num_answers > 1:
        raise InvalidRequest("--stream prints one answer; leave out -n.")
    asked: dict[str, Any] = {
        **given,
        **adapter_arguments(adapter),
        "priority": priority,
        "routing_key": key,
        "execution": execution,
    }
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "stop": stop,
        "seed": seed,
        "choice": choice,
        "json_schema": _contents(json_schema),
        "regex": regex,
        "lark": _contents(lark),
        **_tools(tools, tool_choice, is_chat=is_chat),
    }
    with Client(target, timeout_s=timeout) as client:
        if classify or label:
            scored = client.classify(**asked, labels=label or ())
            _print_labels(scored, as_json=as_json)
        elif stream:
            _print_stream(client, {**asked, **options}, as_json=as_json)
        else:
            answers = client.generate_many(num_answers, **asked, **options)
            _print_answers(answers, as_json=as_json)


def _read(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _contents(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"'{path}' cannot be read: {error}. Name a text file.") from error


def _tools(path: Path | None, choice: str | None, *, is_chat: bool) -> dict[str, Any]:
    """Return what a file says of functions, and the choice among them."""
    if path is None:
        if choice is not None:
            raise InvalidRequest("--tool-choice needs --tools FILE.")
        return {}
    if not is_chat:
        raise InvalidRequest("--tools needs --chat: only a chat calls functions.")
    try:
        tools = json.loads(_contents(path) or "")
    except ValueError as error:
        raise InvalidRequest(f"'{path}' is no JSON: {error}. Write a list of tools.") from error
    if not isinstance(tools, list):
        raise InvalidRequest(f"'{path}' holds no JSON list; write a list of tools.")
    if choice in (None, "auto", "none", "required"):
        return {"tools": tools, "tool_choice": choice}
    named = {"type": "function", "function": {"name": choice}}
    return {"tools": tools, "tool_choice": named}


def _given(text: str, *, is_prompt: bool, is_chat: bool) -> dict[str, Any]:
    if is_prompt and is_chat:
        raise InvalidRequest("--prompt and --chat are two ways to read TEXT; give one of them.")
    if is_chat:
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt" if is_prompt else "text": text}


def _print_answers(answers: list[GenerateResult], *, as_json: bool) -> None:
    if as_json:
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    for answer in answers:
        if len(answers) > 1:
            typer.echo(f"── {answer.index + 1} of {len(answers)} ──")
        if answer.text or not answer.tool_calls:
            typer.echo(answer.text)
        for called in answer.tool_calls:
            typer.echo(f"{called.name}({called.arguments})")
    print_receipt(answers[-1].receipt, answers[-1].usage.completion_tokens)


def _print_stream(client: Client, asked: dict[str, Any], *, as_json: bool) -> None:
    for event in client.stream(**asked):
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(event), ensure_ascii=False))
        elif isinstance(event, GenerateResult):
            typer.echo()
            for called in event.tool_calls:
                typer.echo(f"{called.name}({called.arguments})")
            print_receipt(event.receipt, event.usage.completion_tokens)
        else:
            typer.echo(event.text, nl=False)
            sys.stdout.flush()


def _print_labels(scored: Classification, *, as_json: bool) -> None:
    if as_json:
        print_json(scored)
        return
    rows = table("label", "probability")
    for label, probability in scored.probabilities.items():
        rows.add_row(label, f"{probability:.4f}")
    console().print(rows)
    print_receipt(scored.receipt, 0)


def adapter_arguments(text: str) -> dict[str, Any]:
    """Return what to call a client with for ``ref``, ``ref*weight`` or several of them joined by ``+``.

    Raises:
        InvalidRequest: a weight is not a number.
    """
    parts = [part.rpartition("*") for part in text.split("+")]
    if len(parts) == 1 and not parts[0][1]:
        return {"adapter": text}
    weights = []
    for ref, star, weight in parts:
        try:
            weights.append((ref.strip(), float(weight)) if star else (weight.strip(), 1.0))
        except ValueError as error:
            raise InvalidRequest(
                f"'{weight}' in '{text}' is no weight; write 'ref*0.7+other*0.3'."
            ) from error
    if len(weights) == 1:
        return {"adapter": weights[0][0], "scale": weights[0][1]}
    return {"adapters": weights}


def _answerer(receipt: Receipt) -> str:
    if not receipt.parts:
        return f"{receipt.name}@{receipt.version}"
    return "+".join(f"{part.name}@{part.version}*{part.weight:g}" for part in receipt.parts)


def print_receipt(receipt: Receipt, num_tokens: int) -> None:
    """Say on stderr who answered, with how many tokens if any, and how long that took."""
    name = f"{_answerer(receipt)} {receipt.digest[:19]}" if receipt.name else "base"
    name += " (canary)" if receipt.canary else ""
    name += " (merged)" if receipt.is_merged else ""
    times = receipt.timings
    seconds = times.queue_s + times.prefill_s + times.decode_s
    tokens = f", {num_tokens} tokens" if num_tokens else ""
    typer.echo(f"{name}{tokens}, {seconds * 1000:.0f} ms on the server", err=True)
