"""The forgetting table: each adapter on each task, beside the base, and what each has lost of the others' tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from lorary.registry.manifest import Interval
from lorary.trainer.figures_table import COLOURS, verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.table import Table

    from lorary.registry.manifest import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """A column: one task, as the base does it.

    Attributes:
        metric: the primary one of the task.
        num_examples: held out.
        base: the base's figure.
        confidence: of the intervals in this column.
    """

    metric: str
    num_examples: int
    base: float
    confidence: float

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """Return the column of figures that hold the base's."""
        return cls(
            metric=metrics.primary,
            num_examples=metrics.num_examples,
            base=metrics.base[metrics.primary],
            confidence=metrics.confidence,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one adapter makes of one task.

    Attributes:
        value: its primary figure.
        difference: the value minus the base's.
        interval: of the difference, in pairs; ``None`` where nothing was resampled.
        verdict: ``better`` or ``worse`` where the interval is on one side of 0, ``unsure`` where it is not, else empty.
    """

    value: float
    difference: float
    interval: Interval | None
    verdict: str

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """Return the cell of figures that hold the base's."""
        name = metrics.primary
        found = metrics.uncertainty.get(name)
        return cls(
            value=metrics.adapter[name],
            difference=round(metrics.adapter[name] - metrics.base[name], 4),
            interval=None if found is None else found.difference,
            verdict=verdict(metrics, name),
        )

    def __str__(self) -> str:
        """Return the difference with its interval, and a word where it is a sure one."""
        text = f"{self.difference:+.3f}"
        if self.interval is not None:
            text += f" ({self.interval.low:+.3f} to {self.interval.high:+.3f})"
        return f"{text} {self.verdict}" if self.verdict in ("better", "worse") else text


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgettingTable:
    """All figures.

    Attributes:
        base: the base's name.
        tasks: the columns, by task.
        adapters: the rows: by adapter, a cell for every task.
    """

    base: str
    tasks: Mapping[str, Exam]
    adapters: Mapping[str, Mapping[str, Cell]]

    @classmethod
    def of(cls, base: str, measured: Iterable[tuple[str, str, Metrics]]) -> Self:
        """Return the table of (adapter, task, figures), which are of every adapter on every task."""
        tasks: dict[str, Exam] = {}
        adapters: dict[str, dict[str, Cell]] = {}
        for adapter, task, metrics in measured:
            tasks.setdefault(task, Exam.of(metrics))
            adapters.setdefault(adapter, {})[task] = Cell.of(metrics)
        return cls(base=base, tasks=tasks, adapters=adapters)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Return the table that ``as_json`` wrote."""
        adapters = {
            adapter: {
                task: Cell(**{**one, "interval": one["interval"] and Interval(**one["interval"])})
                for task, one in cells.items()
            }
            for adapter, cells in raw["adapters"].items()
        }
        tasks = {task: Exam(**one) for task, one in raw["tasks"].items()}
        return cls(base=raw["base"], tasks=tasks, adapters=adapters)

    def as_json(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return asdict(self)

    def rendered(self) -> Table:
        """Return the table as a terminal shows it."""
        from lorary.registry.cli_support import table

        heads = [f"{task} ({one.metric})" for task, one in self.tasks.items()]
        found = table(
            "adapter",
            *heads,
            title=f"each adapter on each task, and what it changes of base {self.base}",
        )
        found.add_row("(base)", *(f"{one.base:.3f}" for one in self.tasks.values()))
        for adapter, cells in self.adapters.items():
            shown = (cells[task] for task in self.tasks)
            found.add_row(
                adapter, *(f"{one.value:.3f} [{COLOURS[one.verdict]}]{one}[/]" for one in shown)
            )
        return found
