"""The demo's order of events; ``scripts/demo.py`` starts it."""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.harness.machine import ROOT, commit, machine
from benchmarks.harness.server_process import ServerProcess
from lorary.bases import fetch_assets, find_base
from lorary.errors import CorruptArtifact, LoraryError, outcome
from lorary.registry import Manifest, Registry
from lorary.trainer.data import load_splits
from lorary.trainer.recipe_file import load_recipe
from scripts.demo_calls import ask_all, plan_calls
from scripts.demo_report import (
    NOISE_NOTE,
    compare,
    mixing_table,
    results_table,
    wrong_receipts,
)
from scripts.demo_steps import ChildFailed, PeakMemory, Steps, content_key, only_one, run_child

if TYPE_CHECKING:
    from types import FrameType

    from lorary.trainer.recipe import Recipe
    from scripts.demo_calls import Call, Session
    from scripts.demo_report import TaskResult

TASKS = ("sentiment", "summarization", "translation")
BASE = "smollm2-135m"
ALIAS = "prod"
NUM_BASE_ITEMS = 20
_PACKAGES = ("lorary", "torch", "transformers", "peft")
_LORARY = (sys.executable, "-m", "lorary.cli.main")
console = Console(stderr=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is done where."""

    folder: Path
    tasks: tuple[str, ...]
    overrides: tuple[str, ...]
    concurrency: int
    quantize: str

    @property
    def registry(self) -> Path:
        """The demo's own registry."""
        return self.folder / "registry"

    def output(self, task: str) -> Path:
        """Where the trainer writes a task's adapter."""
        return self.folder / "runs" / task


def main(
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = (
        ROOT / ".lorary" / "demo"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget finished steps.")] = False,
    only: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = ",".join(TASKS),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of every recipe, for a short run.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    quantize: Annotated[
        str, typer.Option(help="Of the served base; trained is what the adapters saw.")
    ] = "trained",
) -> None:
    """Train three adapters, publish, serve and call them; compare with what the trainer said."""
    tasks = tuple(task.strip() for task in only.split(","))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise typer.BadParameter(f"task '{unknown[0]}' is unknown; there are {', '.join(TASKS)}")
    plan = Plan(
        folder=folder.resolve(),
        tasks=tasks,
        overrides=tuple(overrides or ()),
        concurrency=concurrency,
        quantize=quantize,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with only_one(plan.folder):
            if fresh:
                for name in ("steps", "runs", "registry", "server"):
                    shutil.rmtree(plan.folder / name, ignore_errors=True)
            is_good = run(plan)
    except KeyboardInterrupt:
        console.print("\ninterrupted; run it again to go on, finished steps are kept")
        raise typer.Exit(130) from None
    except (LoraryError, ChildFailed, RuntimeError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        code = error.code if isinstance(error, ChildFailed) else outcome(error).exit_code
        raise typer.Exit(code) from error
    raise typer.Exit(0 if is_good else 1)


def run(plan: Plan) -> bool:
    """Do everything; return whether every served adapter is as good as the trainer said."""
    steps = Steps(plan.folder / "steps", console, total=3 + 2 * len(plan.tasks))
    started = time.monotonic()
    versions = {name: version(name) for name in _PACKAGES}
    with PeakMemory() as memory:
        steps.run("fetch assets", content_key(versions), _fetch, is_there=lambda: False)
        base = steps.run("build the base", content_key(BASE, versions), _build_base)
        recipes = {
            task: load_recipe(_recipe_path(task), list(plan.overrides)) for task in plan.tasks
        }
        for task in plan.tasks:
            recipe = _recipe_path(task).read_text()
            key = content_key(recipe, plan.overrides, base["fingerprint"], versions)
            _train(plan, steps, task, key)
        manifests = {task: _push(plan, steps, task) for task in plan.tasks}
        results, session = _serve_and_call(plan, steps, recipes, manifests)
    return _conclude(plan, steps, results, session, memory.bytes, time.monotonic() - started)


def _fetch() -> dict[str, Any]:
    folders = fetch_assets(progress=lambda line: console.print(f"  {line}", highlight=False))
    return {"folders": [str(folder) for folder in folders]}


def _build_base() -> dict[str, Any]:
    # Converting takes a gigabyte, which a child gives back before training begins.
    code = f"from lorary.bases import find_base; find_base({BASE!r}, progress=print)"
    run_child([sys.executable, "-c", code])
    base = find_base(BASE)
    return {"fingerprint": base.card.fingerprint, "folder": str(base.path)}


def _train(plan: Plan, steps: Steps, task: str, key: str) -> None:
    output = plan.output(task)
    started = plan.folder / "steps" / f"train-{task}.started"

    def work() -> dict[str, Any]:
        has_checkpoint = any(output.parent.glob(f"{task}.checkpoints/checkpoint-*/lorary.json"))
        resume = has_checkpoint and started.is_file() and started.read_text() == key
        started.parent.mkdir(parents=True, exist_ok=True)
        started.write_text(key)
        command = [*_LORARY, "train", str(_recipe_path(task)), "--output", str(output), "--force"]
        for override in plan.overrides:
            command += ["--set", override]
        run_child([*command, *(["--resume"] if resume else [])])
        manifest = Manifest.from_json((output / "manifest.json").read_bytes())
        return {"seconds": manifest.training["seconds"]}

    steps.run(f"train {task}", key, work, is_there=lambda: (output / "manifest.json").is_file())


def _push(plan: Plan, steps: Steps, task: str) -> Manifest:
    folder = plan.output(task)

    def work() -> dict[str, Any]:
        command = [*_LORARY, "registry", "push", str(folder), task, "--alias", ALIAS]
        run_child([*command, "--registry", str(plan.registry)])
        return {"digest": Registry.open(plan.registry).resolve(f"{task}@{ALIAS}").digest}

    # Pushing equal content gives the version that is there, so it is never skipped.
    key = content_key((folder / "manifest.json").read_text())
    steps.run(f"push {task}@{ALIAS}", key, work, is_there=lambda: False)
    registry = Registry.open(plan.registry)
    return registry.manifest(registry.resolve(f"{task}@{ALIAS}"))


def _serve_and_call(
    plan: Plan, steps: Steps, recipes: dict[str, Recipe], manifests: dict[str, Manifest]
) -> tuple[list[TaskResult], Session]:
    splits = {task: load_splits(recipe) for task, recipe in recipes.items()}
    for task, split in splits.items():
        _check_same_items(task, split.fingerprint, manifests[task])
    texts = {task: [e.inputs["text"] for e in split.test] for task, split in splits.items()}
    labelled = {task for task, recipe in recipes.items() if recipe.task.labels}
    calls = plan_calls(texts, labelled, NUM_BASE_ITEMS)
    found: list[Session] = []

    def work() -> dict[str, Any]:
        session = _session(plan, calls, manifests)
        found.append(session)
        return {"calls": len(session.answers), "seconds": round(session.seconds, 1)}

    steps.run("serve and call", "", work, is_there=lambda: False)
    (session,) = found
    results = []
    for task in plan.tasks:
        answers = [a for a in session.answers if a.call.task == task and a.call.kind != "base"]
        references = [e.target for e in splits[task].test]
        results.append(compare(recipes[task], manifests[task], references, answers))
    return results, session


def _session(plan: Plan, calls: list[Call], manifests: dict[str, Manifest]) -> Session:
    quantize = plan.quantize
    if quantize == "trained":
        quantize = manifests[plan.tasks[0]].base.quantization
    arguments = ["--base", BASE, "--registry", str(plan.registry), "--quantize", quantize]
    arguments += ["--max-batch", str(plan.concurrency), "--max-context", "512"]
    with (
        ServerProcess(arguments, plan.folder / "server") as server,
        Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as progress,
    ):
        console.print(f"  lorary serve is ready at {server.address}", highlight=False)
        line = f"{len(calls)} requests, {plan.concurrency} at a time"
        bar = progress.add_task(line, total=len(calls))
        return asyncio.run(
            ask_all(
                server.address,
                calls,
                alias=ALIAS,
                concurrency=plan.concurrency,
                advance=lambda: progress.advance(bar),
            )
        )


def _check_same_items(task: str, fingerprint: str, manifest: Manifest) -> None:
    if manifest.data.get("fingerprint") != fingerprint:
        raise CorruptArtifact(
            f"the data of '{task}' is not what its adapter was trained and measured on "
            f"({fingerprint[:19]}… now). Run with --fresh."
        )


def _conclude(
    plan: Plan,
    steps: Steps,
    results: list[TaskResult],
    session: Session,
    peak_bytes: int,
    seconds: float,
) -> bool:
    wrong = wrong_receipts(session, {r.task: r.digest for r in results})
    is_good = not wrong and all(r.is_as_promised for r in results)
    base_calls = [a.seconds for a in session.answers if a.call.kind == "base"]
    tokens = sum(a.num_tokens for a in session.answers)
    whole_s = sum(record.seconds for record in steps.records)
    output = Console(width=None if sys.stdout.isatty() else 100)
    output.print(results_table(results))
    output.print(NOISE_NOTE, style="dim", highlight=False)
    output.print(mixing_table(session.info.steps_by_distinct_adapters))
    output.print(
        f"{len(session.answers)} requests ({len(base_calls)} to the bare base, p50 "
        f"{1e3 * statistics.median(base_calls):.0f} ms) with up to {plan.concurrency} in flight: "
        f"{tokens / session.seconds:.0f} tokens/s generated, every receipt checked; peak memory "
        f"{peak_bytes / 1e9:.1f} GB; {seconds / 60:.1f} min now, {whole_s / 60:.1f} min for all "
        "steps",
        highlight=False,
    )
    for line in wrong[:5]:
        output.print(f"[red]wrong adapter:[/] {line}", highlight=False)
    for result in results:
        if not result.is_as_promised:
            output.print(
                f"[red]{result.task} is worse through the server:[/] {result.metric} "
                f"{result.served:.3f}, the trainer said {result.adapter:.3f}, noise "
                f"{result.noise:.3f}",
                highlight=False,
            )
    summary = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ok": is_good,
        **commit(),
        "machine": machine(),
        "tasks": {r.task: {**asdict(r), "ok": r.is_as_promised} for r in results},
        "steps_by_distinct_adapters": list(session.info.steps_by_distinct_adapters),
        "num_requests": len(session.answers),
        "num_base_requests": len(base_calls),
        "num_wrong_receipts": len(wrong),
        "concurrency": plan.concurrency,
        "output_tokens_per_s": round(tokens / session.seconds, 1),
        "server": asdict(session.info),
        "peak_memory_bytes": peak_bytes,
        "seconds": round(seconds, 1),
        "seconds_of_all_steps": round(whole_s, 1),
        "steps": [asdict(record) for record in steps.records],
    }
    path = plan.folder / "summary.json"
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    output.print(f"all figures: {path}", highlight=False, soft_wrap=True)
    return is_good


def _recipe_path(task: str) -> Path:
    return ROOT / "recipes" / f"{task}.yaml"


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
