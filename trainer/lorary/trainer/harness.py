"""Tasks of EleutherAI's lm-evaluation-harness, asked of base and adapter alike.

The harness asks and scores; what is added is that both sides are resampled in pairs. That takes the score of
each document, which the harness keeps, and a task whose figure is their mean, which most are. Figures that are
something else (corpus perplexities) are given as the harness gives them, without intervals.
"""

from __future__ import annotations

import logging
import math
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRequest, MissingDependency
from lorary.registry.manifest import Metrics
from lorary.trainer.measure import Measured, attached, load_for
from lorary.trainer.metrics import mean_sums
from lorary.trainer.quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lorary.bases import Base
    from lorary.bases.load import Quantization
    from lorary.trainer.bootstrap import Bootstrap, Sums
    from lorary.trainer.measure import Subject
    from lorary.trainer.progress import Reporter

_CLOSE = 1e-9


def measure_tasks(
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    *,
    tasks_folder: Path | None,
    limit: int,
    batch_size: int,
    base: Base,
    quantization: Quantization | None,
    dtype: Any,
    device: str,
    bootstrap: Bootstrap,
    reporter: Reporter,
) -> Iterator[Measured]:
    """Let every adapter and the base do tasks of the harness; yields one adapter's figures at a time.

    Args:
        subjects: adapters of ``base``.
        tasks: names of tasks or groups; a group is reported task by task.
        tasks_folder: with further tasks, as YAML.
        limit: documents of each task; 0 is all.
        batch_size: documents at a time.
        base: loaded once.
        quantization: of the base; ``None`` is what the first adapter was trained on.
        dtype: torch dtype of what is not quantized.
        device: a torch device.
        bootstrap: how figures are resampled.
        reporter: where progress goes.

    Raises:
        MissingDependency: the harness is not installed.
        InvalidRequest: it has no such task.
        CorruptArtifact, ConfigError: as ``measure``.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependency(
            "--lm-eval needs lm-eval, which is not installed. Run: pip install 'lorary[harness]'"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _find(tasks, tasks_folder)
    loaded = load_for(subjects, base, quantization=quantization, dtype=dtype, device=device)

    def ask(model: Any, who: str) -> dict[str, dict[str, Any]]:
        reporter.note(f"{who} on {', '.join(tasks)}")
        return _ask(model, loaded.tokenizer, tasks, manager, limit, batch_size)

    before: dict[str, dict[str, Any]] = {}
    for subject, wrapped in attached(loaded.model, subjects):
        started = time.monotonic()
        if not before:
            with wrapped.disable_adapter():
                before = ask(wrapped, base.name)
        for task, found in ask(wrapped, subject.ref).items():
            yield Measured(
                adapter=subject.ref,
                digest=subject.digest,
                exam=task,
                base=base.name,
                quantization=loaded.quantization,
                metrics=_metrics(before[task], found, bootstrap),
                seconds=round(time.monotonic() - started, 1),
            )


def _find(tasks: Sequence[str], folder: Path | None) -> Any:
    """Return the harness' index of tasks, with these in it.

    Its own tasks are only read where one is not in ``folder``: their 14,000 files take 20 seconds.
    """
    from lm_eval.tasks import TaskManager

    own = None if folder is None else str(folder)
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if all(name in manager.all_tasks for name in tasks):
            return manager
    manager = TaskManager(include_path=own)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise InvalidRequest(
            f"lm-eval has no task '{unknown[0]}'; 'lm-eval ls tasks' lists them, and --lm-eval-path "
            "names a folder with one's own.",
            field="lm-eval",
        )
    return manager


def _ask(
    model: Any, tokenizer: Any, tasks: Sequence[str], manager: Any, limit: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return of every task its figures, and of those that are means the scores of its documents."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with quiet_libraries():
        result = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit or None,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
    found = {}
    for task, samples in result["samples"].items():
        figures, sums = {}, {}
        for key, value in result["results"][task].items():
            metric, _, kept = key.partition(",")
            if not isinstance(value, (int, float)) or not kept or metric.endswith("_stderr"):
                continue
            name = metric if kept == "none" else f"{metric}.{kept}"
            figures[name] = round(float(value), 4)
            scores = [sample.get(metric) for sample in samples if sample["filter"] == kept]
            if _is_mean(scores, value):
                sums[name] = mean_sums([float(score) for score in scores])
        documents = {sample["doc_id"] for sample in samples}
        found[task] = {"figures": figures, "sums": sums, "count": len(documents)}
    return found


def _is_mean(scores: Sequence[Any], value: float) -> bool:
    """Whether the figure of a task is the mean of its documents' scores."""
    if not scores or not all(isinstance(score, (int, float)) for score in scores):
        return False
    return math.isclose(sum(scores) / len(scores), value, rel_tol=_CLOSE, abs_tol=_CLOSE)


def _metrics(before: Mapping[str, Any], after: Mapping[str, Any], bootstrap: Bootstrap) -> Metrics:
    base: Mapping[str, Sums] = before["sums"]
    # A metric is resampled on both sides or on none: its scores may be means on one side by chance.
    adapter = {name: one for name, one in after["sums"].items() if name in base}
    return Metrics(
        primary=next(iter(after["figures"])),
        num_examples=after["count"],
        base=before["figures"],
        adapter=after["figures"],
        uncertainty=bootstrap.uncertainty(adapter, base),
        confidence=bootstrap.confidence,
    )
