"""The order of events of ``service``, and its table."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import grpc.aio
import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.load import process_tree
from benchmarks.harness.machine import head, result_path
from benchmarks.harness.server_process import ServerProcess
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import origin, row
from lorary.registry import Registry
from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    Load = Callable[[Sequence[Sequence[int]], int], Coroutine[Any, Any, int]]

NAME = "service"
PROMPT_TOKENS = 64
QUIET = 0.1
"""Most cores that others may use on average."""
BAR = 0.9
"""Least share of gRPC's tokens per second that the HTTP door must make."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each door.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 64,
    base: options.Base = options.BASE,
    threads: options.Threads = 0,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: options.Table = False,
) -> None:
    """Compare the two doors of one server."""
    if table:
        options.show(NAME, out, section)
        return
    used = threads or len(os.sched_getaffinity(0))
    setup = {"base": base, "threads": used, "streams": streams, "tokens": tokens}
    path = out or result_path(NAME)
    quiet = Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load)
    kept = Kept(path, head(NAME, setup), quiet)
    prompts = _prompts(base, streams)
    with tempfile.TemporaryDirectory(prefix="lorary-service-") as scratch:
        Registry.open(Path(scratch) / "registry", create=True)
        arguments = ["--base", base, "--registry", f"{scratch}/registry", "--device", "cpu"]
        arguments += ["--threads", str(used), "--http-port", "0", "--max-batch", str(streams)]
        with ServerProcess(arguments, Path(scratch)) as server:
            doors = _doors(server)
            for load in doors.values():
                asyncio.run(load(prompts, tokens))
            for turn in range(rounds):
                # Who is first has the caches of nobody.
                for name in list(doors)[:: 1 if turn % 2 else -1]:
                    kept.measure(
                        functools.partial(_round, name, doors[name], server, prompts, tokens)
                    )
    console.print(f"records: {path}")
    Console().print(table_of(report.read(path)), highlight=False, soft_wrap=True)
    if not kept.is_complete:
        console.print("some rounds were not measured on a quiet machine; wait, or --tolerate-load")
        raise typer.Exit(1)


def _prompts(name: str, count: int) -> list[tuple[int, ...]]:
    from benchmarks.setup import TEXT
    from benchmarks.workload import Prompts
    from lorary.bases import find_base
    from lorary.bases.load import load_tokenizer

    tokenizer = load_tokenizer(find_base(name))
    return Prompts(tokenizer, TEXT).take(count, PROMPT_TOKENS, random.Random(0))


def _round(
    name: str,
    load: Load,
    server: ServerProcess,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> dict[str, Any]:
    """Measure one round of one door."""
    pid = int(server.facts["pid"])
    ticks, started = process_tree(pid)[pid], time.monotonic()
    count = asyncio.run(load(prompts, tokens))
    seconds = time.monotonic() - started
    cpu_s = (process_tree(pid)[pid] - ticks) / os.sysconf("SC_CLK_TCK")
    return {
        "kind": "round",
        "door": name,
        "tokens_per_s": round(count / seconds, 1),
        "server_cpu_us_per_token": round(1e6 * cpu_s / count),
    }


def _doors(server: ServerProcess) -> dict[str, Load]:
    async def by_grpc(prompts: Sequence[Sequence[int]], tokens: int) -> int:
        """Stream every prompt's answer through one channel; return how many tokens came."""
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]

            async def one(ids: Sequence[int]) -> int:
                sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
                read = pb.Input(token_ids=pb.TokenIds(ids=ids))
                request = pb.GenerateRequest(input=read, sampling=sampling)
                return sum([len(e.chunk.token_ids) async for e in stub.Generate(request)])

            return sum(await asyncio.gather(*map(one, prompts)))

    async def by_http(prompts: Sequence[Sequence[int]], tokens: int) -> int:
        """The same, through a connection each."""
        url = urlsplit(str(server.facts["http"]))

        async def one(ids: Sequence[int]) -> int:
            body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            options = {"stream": True, "stream_options": {"include_usage": True}}
            sent = json.dumps({**body, **options}).encode()
            reader, writer = await asyncio.open_connection(url.hostname, url.port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(sent) + sent
            )
            events = [line async for line in reader if line.startswith(b"data: ")]
            writer.close()
            await writer.wait_closed()
            if not events or b"[DONE]" not in events[-1]:
                raise RuntimeError(f"a stream over HTTP ended with {events[-1:]}")
            return int(json.loads(events[-2].removeprefix(b"data: "))["usage"]["completion_tokens"])

        return sum(await asyncio.gather(*map(one, prompts)))

    return {"gRPC": by_grpc, "HTTP": by_http}


def medians(records: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return each door's tokens per second and microseconds of server CPU for one, of accepted rounds."""
    rounds = [r for r in records if r["kind"] == "round" and r["accepted"]]
    return {
        door: (
            statistics.median(r["tokens_per_s"] for r in rounds if r["door"] == door),
            statistics.median(r["server_cpu_us_per_token"] for r in rounds if r["door"] == door),
        )
        for door in dict.fromkeys(r["door"] for r in rounds)
    }


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return both doors as Markdown."""
    found = medians(records)
    if set(found) != {"gRPC", "HTTP"}:
        return "no round of both was measured on a quiet machine"
    share = found["HTTP"][0] / found["gRPC"][0]
    lines = [
        row(["door", "output tokens/s", "server CPU, µs a token"]),
        row(["---", "---:", "---:"]),
        *(
            row([door, f"{speed:.0f}", f"{cpu:.0f}"])
            for door, (speed, cpu) in sorted(found.items())
        ),
    ]
    verdict = "ok" if share >= BAR else "short"
    return "\n".join([*lines, "", f"HTTP makes {share:.0%} of gRPC's; bar: {BAR:.0%}, {verdict}."])


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = report.read(path)
    setup = records[0]["setup"]
    foreign = max(r["load"]["foreign_cores"] for r in records if r["accepted"])
    return "\n".join(
        [
            f"{origin(records[0])}; {setup['streams']} streams of {setup['tokens']} tokens on the bare base, "
            f"medians of rounds in turn, others used at most {foreign:.2f} cores. "
            f"Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
