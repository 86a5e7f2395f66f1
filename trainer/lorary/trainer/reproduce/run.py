"""Run a version's recipe again: first what it needs must be what it was, then the result is compared.

1. the manifest's recipe; where the base and the data are may be said anew, nothing else
2. base and data fingerprints; a difference ends it here, for the result could not be the same
3. the run, as ``lorary train`` does it, on as many threads
4. loss curve, held-out figures, tensors; both adapters are brought into the registry's canonical form, so
   that a version from a registry and a fresh folder are alike
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.errors import IncompatibleAdapter, InvalidRequest
from lorary.registry.store import Registry
from lorary.trainer.provenance import hardware, loss_curve
from lorary.trainer.quantplan.use import plan_facts
from lorary.trainer.recipe_file import build_any_recipe
from lorary.trainer.reproduce.compare import (
    Comparison,
    compare_curves,
    compare_metrics,
    compare_tensors,
)
from lorary.trainer.train import Prepared, prepare, train

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorary.registry.base import BaseCard
    from lorary.registry.manifest import Manifest
    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe
    from lorary.trainer.tasks.recipe import TasksRecipe

MOVABLE = ("base", "data.path", "method.quantization_plan", "training.device")
"""Keys that say where something is, and not what is done; the fingerprints prove that it is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What came of it.

    Attributes:
        what: the version or folder.
        comparisons: loss curve, figures, tensors.
        environment: what else is not as it was (packages, machine), one line each.
        tolerance: largest difference that counts as the same.
        seconds: of the run now, and then.
    """

    what: str
    comparisons: tuple[Comparison, ...]
    environment: tuple[str, ...]
    tolerance: float
    seconds: tuple[float, float]

    @property
    def is_reproduced(self) -> bool:
        """Whether everything is within the tolerance."""
        return all(one.is_within for one in self.comparisons)

    @property
    def is_bit_equal(self) -> bool:
        """Whether every loss, figure and tensor is the same to the last bit."""
        return all(one.is_equal for one in self.comparisons)


def reproduce(
    what: str,
    folder: Path,
    manifest: Manifest,
    *,
    output: Path | None = None,
    moved: Mapping[str, str] | None = None,
    tolerance: float,
    reporter: Reporter,
) -> Reproduction:
    """Check, train again, compare.

    Args:
        what: for people.
        folder: a PEFT folder as training or a registry wrote it.
        manifest: its own.
        output: where to keep the new run; dropped if None.
        moved: other places of base, data file or device, by key (``MOVABLE``).
        tolerance: see ``compare``.
        reporter: where progress goes.

    Raises:
        InvalidRequest: the manifest has no recipe.
        IncompatibleAdapter: base or data are not those of the manifest.
    """
    recipe = recipe_of(manifest, moved or {})
    run = prepare(recipe, reporter)
    check_inputs(run, manifest)
    with tempfile.TemporaryDirectory(prefix="lorary-reproduce-") as scratch:
        fresh = output or Path(scratch) / "run"
        again = train(recipe, fresh, reporter=reporter)
        comparisons = [
            *compare_curves(_curve(manifest, folder), _curve(again, fresh), tolerance),
            *compare_metrics(manifest, again, tolerance),
            _compare_canonical(folder, fresh, run.base.card, Path(scratch), tolerance),
        ]
    return Reproduction(
        what=what,
        comparisons=tuple(comparisons),
        environment=tuple(environment_changes(manifest)),
        tolerance=tolerance,
        seconds=(float(again.training["seconds"]), float(manifest.training.get("seconds", 0.0))),
    )


def recipe_of(manifest: Manifest, moved: Mapping[str, str]) -> Recipe | TasksRecipe:
    """Return the recipe that a manifest records, with things that lie elsewhere now.

    Raises:
        InvalidRequest: it has none, or ``moved`` names a key that says more than a place.
        InvalidRecipe: the recipe is of another Lorary and not understood.
    """
    tree = manifest.training.get("recipe")
    if not isinstance(tree, dict):
        raise InvalidRequest(
            "its manifest has no training.recipe, so it was not made by 'lorary train' and there is "
            "nothing to run again"
        )
    tree = copy.deepcopy(tree)
    # Of several tasks each has a place of its own.
    each = [f"tasks.{name}.data.path" for name in tree.get("tasks", ())]
    movable = [*each, *(key for key in MOVABLE if not (each and key == "data.path"))]
    for key, value in moved.items():
        if key not in movable:
            raise InvalidRequest(
                f"--set {key} would change what is trained; only {', '.join(movable)} may be set",
                field=key,
            )
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[name] = value
    return build_any_recipe(tree)


def check_inputs(run: Prepared, manifest: Manifest) -> None:
    """Refuse a base or data with another fingerprint.

    Raises:
        IncompatibleAdapter: it says which, with both fingerprints.
    """
    differences = []
    if run.base.card.fingerprint != manifest.base.fingerprint:
        differences.append(
            f"the base '{run.base.name}' has fingerprint {_short(run.base.card.fingerprint)}, and it was "
            f"trained on '{manifest.base.name}' with {_short(manifest.base.fingerprint)}"
        )
    recorded = str(manifest.data.get("fingerprint", "none"))
    if run.data_fingerprint != recorded:
        sizes = ", ".join(
            f"{len(getattr(run.splits, part))} {part} examples (then {then})"
            for part in ("train", "validation", "test")
            if (then := manifest.data.get(f"num_{part}")) != len(getattr(run.splits, part))
        )
        differences.append(
            f"the data has fingerprint {_short(run.data_fingerprint)}, and was {_short(recorded)} then"
            + (f": {sizes}" if sizes else ", with as many examples but not the same")
        )
    plan = plan_facts(run.kind.formats).get("quantization_plan")
    if plan != manifest.training.get("quantization_plan"):
        differences.append("the quantization plan keeps other layers whole than then")
    if differences:
        raise IncompatibleAdapter(
            f"it cannot be reproduced: {'; '.join(differences)}. Bring back what it was trained with; "
            "--set base=… and --set data.path=… say where it lies."
        )


def environment_changes(manifest: Manifest) -> list[str]:
    """Return one line for each package and part of the machine that is not as it was."""
    lines = []
    for name, then in dict(manifest.training.get("versions", {})).items():
        try:
            now = version(name)
        except PackageNotFoundError:
            now = "not installed"
        if now != then:
            lines.append(f"{name} {now}, then {then}")
    python = manifest.training.get("python", "")
    if python not in ("", platform.python_version()):
        lines.append(f"python {platform.python_version()}, then {python}")
    recorded, here = manifest.training.get("hardware", {}), hardware()
    lines += [
        f"{part} {here[part]}, then {recorded[part]}"
        for part in ("cpu", "cpus", "gpus")
        if part in recorded and recorded[part] != here[part]
    ]
    return lines


def _curve(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Return a run's losses: from its manifest, or from the report of one that is older."""
    recorded = manifest.training.get("loss_curve")
    if isinstance(recorded, dict):
        return recorded
    path = folder / "report" / "history.jsonl"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(loss_curve([json.loads(line) for line in lines]))


def _compare_canonical(
    before: Path, after: Path, card: BaseCard, scratch: Path, tolerance: float
) -> Comparison:
    """Bring both into canonical form, by way of a registry of their own, and compare."""
    registry = Registry.open(scratch / "registry", create=True)
    places = []
    for name, folder in (("before", before), ("after", after)):
        # A registry's own folders are hard links, which a push does not trust.
        copied = shutil.copytree(folder, scratch / name)
        info = registry.push(copied, name, base=card, allow_zero=True, max_ratio=1e6)
        places.append(registry.fetch(registry.resolve(f"{name}@{info.version}")))
    files = [place / "adapter_model.safetensors" for place in places]
    return compare_tensors(files[0], files[1], tolerance)


def _short(fingerprint: str) -> str:
    return fingerprint[:19] + "…" if len(fingerprint) > 20 else fingerprint
