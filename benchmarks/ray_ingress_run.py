"""The order of events of ``ray_ingress``, and its table."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import grpc
import typer
from rich.console import Console

from benchmarks import options, report
from benchmarks.harness.machine import ROOT, head, newest_results, result_path
from benchmarks.harness.ray_cluster import RayProcess
from benchmarks.harness.server_process import ServerProcess
from benchmarks.kept import Kept, Quiet
from benchmarks.markdown import row
from lorary.registry import Registry
from lorary.v1 import inference_pb2 as pb
from lorary.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "ray-ingress"
DOCUMENT = ROOT / "docs" / "scaling.md"
QUIET = 0.1
"""Most cores that others may use on average."""
NUM_UNARY, NUM_STREAMS, NUM_TOKENS = 300, 8, 32
DOORS = ("plain", "ray")
console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 3,
    base: options.Base = options.BASE,
    tolerate_load: options.TolerateLoad = False,
    retries: options.Retries = options.RETRIES,
    out: options.Out = None,
    table: Annotated[
        bool, typer.Option("--table", help="Only render into docs/scaling.md.")
    ] = False,
) -> None:
    """Compare a plain server with one replica on Ray Serve."""
    if table:
        path = out or newest_results(NAME)
        report.write_section(DOCUMENT, NAME, section(path))
        return
    threads = len(os.sched_getaffinity(0))
    path = out or result_path(NAME)
    setup = {"base": base, "threads": threads, "unary": NUM_UNARY, "tokens": NUM_TOKENS}
    setup["ray"] = importlib.metadata.version("ray")
    quiet = Quiet(max_foreign=QUIET, retries=retries, tolerate=tolerate_load)
    kept = Kept(path, head(NAME, setup), quiet)
    with tempfile.TemporaryDirectory(prefix="lorary-ingress-") as scratch:
        registry = f"{scratch}/registry"
        Registry.open(Path(registry), create=True)
        flags = ["--base", base, "--registry", registry, "--device", "cpu", "--no-pin-threads"]
        flags += ["--threads", str(threads)]
        args = {"base": base, "registry": registry, "device": "cpu", "threads": threads}
        ports = {"port": _free_port(), "http_port": _free_port()}
        with (
            ServerProcess(flags, Path(scratch)) as plain,
            RayProcess(args, **ports, log=Path(scratch) / "ray.log", replicas=1, cores=threads),
        ):
            addresses = {"plain": plain.address, "ray": f"127.0.0.1:{ports['port']}"}
            for door in DOORS:
                _round(door, addresses[door])
            for turn in range(rounds):
                for door in DOORS[:: 1 if turn % 2 else -1]:
                    kept.measure(functools.partial(_round, door, addresses[door]))
    kept.finish(console, table_of)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _round(door: str, address: str) -> dict[str, Any]:
    """Return medians of one round through one door, in ms."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub
        inference = stub(channel)
        unary = []
        for _ in range(NUM_UNARY):
            started = time.perf_counter()
            inference.Tokenize(pb.TokenizeRequest(input=pb.Input(prompt="Once upon a time")))
            unary.append(time.perf_counter() - started)
        first, gaps = [], []
        for _ in range(NUM_STREAMS):
            times = [time.perf_counter()]
            request = pb.GenerateRequest(
                input=pb.Input(prompt="Once upon a time"),
                sampling=pb.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
            )
            times.extend(
                time.perf_counter()
                for event in inference.Generate(request)
                if event.WhichOneof("event") == "chunk"
            )
            first.append(times[1] - times[0])
            gaps.append((times[-1] - times[1]) / (NUM_TOKENS - 1))
    quantiles = statistics.quantiles(unary, n=100)
    return {
        "kind": door,
        "unary_p50_ms": round(quantiles[49] * 1e3, 3),
        "unary_p99_ms": round(quantiles[98] * 1e3, 3),
        "first_token_ms": round(statistics.median(first) * 1e3, 3),
        "token_ms": round(statistics.median(gaps) * 1e3, 3),
    }


_FIGURES = {
    "unary_p50_ms": "unary call, p50",
    "unary_p99_ms": "unary call, p99",
    "first_token_ms": "first token of a stream, median",
    "token_ms": "each further token, median",
}


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return medians over the rounds as Markdown."""
    lines = [
        row(["ms", "plain server", "behind Ray Serve", "more"]),
        row(["---", "---:", "---:", "---:"]),
    ]
    for key, what in _FIGURES.items():
        plain, ray = (
            statistics.median(r[key] for r in records if r["kind"] == door and r["accepted"])
            for door in DOORS
        )
        lines.append(row([what, f"{plain:.2f}", f"{ray:.2f}", f"{ray - plain:.2f}"]))
    return "\n".join(lines)


def section(path: Path) -> str:
    """Return what stands between the markers."""
    records = [record for record in report.read(path) if record["accepted"]]
    made = records[0]
    foreign = max(record["load"]["foreign_cores"] for record in records)
    return "\n".join(
        [
            f"{made['date']}, {made['machine']['cpu']} ({made['machine']['cores']} cores), Ray "
            f"{made['setup']['ray']}, base {made['setup']['base']} with {made['setup']['threads']} threads; "
            f"medians of {len(records) // len(DOORS)} rounds. Others used up to {foreign:.2f} cores "
            f"meanwhile. Records: `benchmarks/results/{path.name}`.",
            "",
            table_of(records),
        ]
    )
