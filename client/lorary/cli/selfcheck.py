"""``lorary selfcheck``: are answers in a mixed batch those that the same questions get alone?"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorary.cli.call import JsonOption, TargetOption
from lorary.cli.selfcheck_cases import TOP, Case, Check, difference, make_cases
from lorary.client import AsyncClient
from lorary.client.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from lorary.errors import IncompatibleAdapter, InvalidRequest, LoraryError, Unavailable
from lorary.registry.cli_support import print_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from lorary.client import GenerateResult, ServerInfo

app = typer.Typer(name="selfcheck", add_completion=False, pretty_exceptions_enable=False)

# With these a native answer's bits do not depend on its company (docs/architecture.md). Layers are shared in
# the prefix cache: a server that is asked for the one without the other does not start.
EXACT = ("--draft-rows", "0", "--no-prefix-cache", "--shared-layers", "0")
TIE_NATS = 0.05
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0


@app.command(epilog="Example: lorary selfcheck -- --base smollm2-135m --device cpu")
def selfcheck(
    serve_options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- SERVE_OPTIONS]",
            help="Start a server of its own with these options, and stop it at the end.",
        ),
    ] = None,
    num_adapters: Annotated[
        int, typer.Option("--adapters", min=0, max=64, help="Most adapters to ask.")
    ] = 8,
    rounds: Annotated[
        int, typer.Option(min=1, max=1000, help="How often all questions are asked at once.")
    ] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of an answer.")] = 24,
    tie: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Nats by which two tokens may differ and be exchanged; default 0.05, and 0 for a server "
            "that it starts.",
        ),
    ] = None,
    target: TargetOption = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Ask base, adapters and compositions alone and all at once; exit with 1 if an answer differs."""
    if tie is None:
        tie = 0.0 if serve_options else TIE_NATS
    with _target(serve_options, target) as address:
        checks = asyncio.run(
            _run(address, num_adapters, rounds, max_tokens, tie, timeout, as_json=as_json)
        )
    if as_json:
        print_json(checks)
    if any(check.result == "FAIL" for check in checks):
        raise typer.Exit(1)


async def _run(
    address: str,
    num_adapters: int,
    rounds: int,
    max_tokens: int,
    tie: float,
    timeout_s: float,
    *,
    as_json: bool,
) -> list[Check]:
    """Return the checks, and print each when it is done."""
    checks = []
    async with AsyncClient(address, timeout_s=timeout_s) as client:
        options = {"max_tokens": max_tokens, "ignore_eos": True, "logprobs": TOP}
        async for check in _checks(client, num_adapters, rounds, tie, options):
            checks.append(check)
            if not as_json:
                typer.echo(f"{check.result:4}  {check.name:40}  {check.detail}")
    return checks


async def _checks(
    client: AsyncClient, num_adapters: int, rounds: int, tie: float, options: dict[str, Any]
) -> AsyncIterator[Check]:
    alone: list[tuple[Case, GenerateResult]] = []
    for case in make_cases(await client.list_adapters(), num_adapters):
        try:
            alone.append((case, await _ask(client, case, options)))
        except (IncompatibleAdapter, InvalidRequest) as error:
            # No part of a sum, or an aLoRA whose invocation no prompt of ours holds.
            yield Check("skip", case.name, str(error))
        except LoraryError as error:
            yield Check("FAIL", case.name, f"alone: {error}")
    before = await client.server_info()
    found: list[set[str]] = [set() for _ in alone]
    source = random.Random(0)
    for _ in range(rounds):
        order = list(range(len(alone)))
        source.shuffle(order)
        answers = await asyncio.gather(
            *(_ask(client, alone[i][0], options) for i in order), return_exceptions=True
        )
        for i, answer in zip(order, answers, strict=True):
            if isinstance(answer, LoraryError):
                found[i].add(str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[i].add(difference(alone[i][1], answer, tie))
    for (case, answer), differences in zip(alone, found, strict=True):
        wrong = sorted(differences - {""})
        detail = f"{len(answer.token_ids)} tokens, {rounds} times as alone"
        yield Check("FAIL" if wrong else "ok", case.name, "; ".join(wrong) or detail)
    yield _mixed(before, await client.server_info(), [case for case, _ in alone])


async def _ask(client: AsyncClient, case: Case, options: dict[str, Any]) -> GenerateResult:
    return await client.generate(prompt=case.prompt, **case.named, **options)


def _mixed(before: ServerInfo, after: ServerInfo, cases: Sequence[Case]) -> Check:
    """Check that adapters really shared steps; else the comparison would prove nothing."""
    if len({case.name for case in cases if case.named}) < 2:
        return Check("skip", "mixed steps", "fewer than two adapters could be asked")
    counts = list(after.steps_by_distinct_adapters)
    for k, count in enumerate(before.steps_by_distinct_adapters):
        counts[k] -= count
    mixed = {k: count for k, count in enumerate(counts) if k >= 2 and count}
    if not mixed:
        return Check("FAIL", "mixed steps", "no step held two adapters; nothing was compared")
    return Check(
        "ok", "mixed steps", f"{sum(mixed.values())} steps held 2 to {max(mixed)} adapters"
    )


@contextmanager
def _target(serve_options: Sequence[str] | None, target: str) -> Iterator[str]:
    """Yield the address to ask: the one given, or that of a server that lives as long as this.

    Raises:
        Unavailable: the server ended, or was not ready in time; its log is on stderr.
    """
    if not serve_options:
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="lorary-selfcheck-") as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "lorary.cli.main", "serve", *serve_options, *EXACT]
        command += ["--port", "0", "--metrics-port", "0", "--ready-file", str(ready)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield _wait_ready(process, ready)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], ready: Path) -> str:
    until = time.monotonic() + START_TIMEOUT_S
    while not ready.exists():
        if process.poll() is not None:
            raise Unavailable(
                f"the server ended with exit code {process.returncode} before it was ready; its log above "
                "says why"
            )
        if time.monotonic() > until:
            raise Unavailable(f"the server was not ready within {START_TIMEOUT_S:g} s")
        time.sleep(0.1)
    address: str = json.loads(ready.read_text())["address"]
    return address
