"""How many directions changes of weights have, by kind of module, for one run or several side by side."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.errors import IncompatibleAdapter, InvalidRequest
from lorary.registry.manifest import Manifest
from lorary.registry.safetensors_file import read_header
from lorary.registry.weight_diff import compare_weights
from lorary.trainer.report.weights import MOST, read_changes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.trainer.report.weights import ModuleChange

ALL = "all modules"
_TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What the changes of some modules have in common; medians, but for ``kept_share``.

    Attributes:
        num_modules: how many.
        ratio: ‖ΔW‖ / ‖W‖.
        rank_90: directions that hold 90 % of ‖ΔW‖²; ``ModuleChange.directions_for``.
        stable_rank: ‖ΔW‖² / σ₁².
        effective_rank: of Roy and Vetterli.
        num_directions: all of them.
        kept_share: of the sum of ‖ΔW‖², how much the adapter holds.
        overlap: of the output directions of this adapter and another's; ``None`` where none is compared.
    """

    num_modules: int
    ratio: float
    rank_90: float
    stable_rank: float
    effective_rank: float
    num_directions: float
    kept_share: float
    overlap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherRun:
    """A run to be shown beside another.

    Attributes:
        name: its method and rank.
        weights: what it did to each module.
        adapter: its tensors' file.
    """

    name: str
    weights: list[ModuleChange]
    adapter: Path

    def overlaps(self, adapter: Path) -> dict[str, float]:
        """Return by module how far the column spaces of both B A agree; see ``registry.weight_diff``.

        Modules that are not LoRA's in both files are left out.
        """
        return {
            one.module: one.overlap
            for one in compare_weights(adapter, self.adapter)
            if one.overlap is not None
        }


def ranks_of(
    changes: Sequence[ModuleChange], overlaps: Mapping[str, float] | None = None
) -> Ranks | None:
    """Sum up changes whose singular values are known; ``None`` where there is none."""
    known = [one for one in changes if one.singular_values]
    if not known:
        return None
    middle = statistics.median
    shared = [overlaps[one.name] for one in known if one.name in overlaps] if overlaps else []
    return Ranks(
        num_modules=len(known),
        ratio=middle(one.ratio for one in known),
        rank_90=middle(one.directions_for(MOST) for one in known),
        stable_rank=middle(one.stable_rank for one in known),
        effective_rank=middle(one.effective_rank for one in known),
        num_directions=middle(len(one.singular_values) for one in known),
        kept_share=sum(one.kept_energy for one in known) / sum(one.energy for one in known),
        overlap=middle(shared) if shared else None,
    )


def ranks_by_kind(
    runs: Sequence[tuple[str, Sequence[ModuleChange], Mapping[str, float]]],
) -> list[tuple[str, str, Ranks]]:
    """Return kind of module, run and figures; runs that share a kind stand together, ``ALL`` comes last.

    Args:
        runs: name, changes and overlaps with the first one's of each.
    """
    kinds = list(dict.fromkeys(one.kind for _, changes, _ in runs for one in changes))
    rows = []
    for kind in (*kinds, ALL) if len(kinds) > 1 else kinds:
        for run, changes, overlaps in runs:
            found = ranks_of([one for one in changes if kind in (one.kind, ALL)], overlaps)
            if found is not None:
                rows.append((kind, run, found))
    return rows


def read_run(folder: Path, fingerprint: str) -> OtherRun:
    """Read what another run did to the weights of the same base.

    Args:
        folder: its output.
        fingerprint: of the base that both must have.

    Raises:
        InvalidRequest: it is no run's output, or has no report.
        CorruptArtifact: its manifest or its tensors' file is damaged.
        IncompatibleAdapter: it is of another base.
    """
    try:
        manifest = Manifest.from_json((folder / "manifest.json").read_text(encoding="utf-8"))
        weights = read_changes(folder / "report" / "weights.json")
        read_header(folder / _TENSORS)  # it is read when this run is over; not to fail then
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"'{folder}' cannot be shown beside this run: {error}. Name the output folder of a run that "
            "wrote a report (evaluation.report).",
            field="beside",
        ) from error
    if manifest.base.fingerprint != fingerprint:
        raise IncompatibleAdapter(
            f"'{folder}' was trained on {manifest.base.name} ({manifest.base.fingerprint[:19]}…), and this "
            f"run's base is another one ({fingerprint[:19]}…): ranks of their changes are not comparable."
        )
    return OtherRun(
        name=f"{manifest.method.name}, rank {manifest.method.rank}",
        weights=weights,
        adapter=folder / _TENSORS,
    )
