"""Look inside a trained model: what the adapter did to weights and to attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.trainer.encoding import Encoder
from lorary.trainer.report.attention import MAX_TOKENS, attention_changes
from lorary.trainer.report.examples import compare_examples
from lorary.trainer.report.weights import module_changes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorary.trainer.answered import Answered
    from lorary.trainer.report.attention import AttentionChange
    from lorary.trainer.report.ranks import OtherRun
    from lorary.trainer.report.weights import ModuleChange
    from lorary.trainer.train import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What a report shows of a model's inside, and of other runs' beside it.

    Attributes:
        weights: what the run did to each module.
        attention: what it did to attention.
        beside: other runs.
        overlaps: by module, of this adapter's directions with those of each of ``beside``.
    """

    weights: list[ModuleChange]
    attention: list[AttentionChange]
    beside: Sequence[OtherRun] = ()
    overlaps: Sequence[Mapping[str, float]] = ()


def look_inside(
    run: Prepared,
    model: Any,
    answered: Mapping[str, Answered],
    adapter: Path,
    beside: Sequence[OtherRun] = (),
) -> Inside:
    """Measure every module's change, and attention on the prompts where the adapter did most.

    Args:
        run: what was trained.
        model: wrapped by PEFT, the adapter active.
        answered: what base and adapter answered, by task, which prompts are chosen by.
        adapter: the tensors' file that was written.
        beside: other runs whose changes are shown with this one's.
    """
    # Of other kinds than a causal language model's, weights alone are shown.
    num_maps = run.recipe.evaluation.num_attention_maps if run.kind.has_probes else 0
    prompts = [
        prompt
        for name, part in run.parts.items()
        for prompt in _telling(part, answered[name], -(-num_maps // len(run.parts)))
    ]
    return Inside(
        weights=module_changes(model),
        attention=attention_changes(model, run.tokenizer, prompts),
        beside=beside,
        overlaps=[other.overlaps(adapter) for other in beside],
    )


def _telling(run: Prepared, answered: Answered, num_prompts: int) -> list[list[int]]:
    """Return held-out prompts of one task, those first where the adapter did most; without a base, the first ones."""
    test = run.splits.test
    outcomes = compare_examples(test, answered.before, answered.after, answered.metrics.primary)
    encoder = Encoder(run.builder, run.task)
    found: list[list[int]] = []
    for pair in (pair for pairs in outcomes.groups.values() for pair in pairs):
        if len(found) == num_prompts:
            break
        prompt = encoder.prompt(test[pair.index])
        if len(prompt) <= MAX_TOKENS:
            found.append(prompt)
    return found
