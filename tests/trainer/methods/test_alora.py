"""An aLoRA learns behind its invocation only, and rows that would begin elsewhere are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.bases import find_base
from lorary.bases.load import load_model
from lorary.errors import InvalidRecipe
from lorary.registry import BaseCard, Registry
from lorary.registry.invocation import active_from
from lorary.trainer.encoding import Row
from lorary.trainer.measure import Exam, Subject, measure
from lorary.trainer.methods.alora import check_rows
from lorary.trainer.methods.attach import keep_unpacked
from lorary.trainer.train import prepare, train
from tests.trainer.methods.test_every_method import SERVED_TOLERANCE
from tests.trainer.served import served_logprobs
from tests.trainer.test_train import losses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.progress import Reporter
    from lorary.trainer.recipe import Recipe

    MakeRecipe = Callable[..., Recipe]

INVOCATION = "<|im_start|>assistant\n"


def method(**changes: Any) -> dict[str, Any]:
    return {"name": "alora", "rank": 4, "invocation": INVOCATION, **changes}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_t8_what_is_kept_and_served_begins_where_it_began_in_training(
    make_recipe: MakeRecipe,
    quiet: Reporter,
    tmp_path: Path,
    tiny_base: Path,
    quantization: str,
    record_property: Callable[[str, object], None],
) -> None:
    recipe = make_recipe(
        method=method(quantization=quantization),
        training__max_steps=8,
        training__eval_every=4,
        evaluation={"skip_base": True, "num_golden_probes": 1},
    )
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    history = [value for _, key, value in losses(tmp_path / "out") if key == "loss"]
    assert min(history[-3:]) < history[0]
    tokens = manifest.method.invocation_tokens
    (probe,) = manifest.golden_probes
    start = active_from(probe.token_ids, tokens)
    assert start == len(probe.token_ids) - len(tokens) > 0

    registry = Registry.open(tmp_path / "registry", create=True)
    registry.push(tmp_path / "out", "judge", base=BaseCard.from_folder(tiny_base))
    assert registry.manifest(registry.resolve("judge")).method.invocation_tokens == tokens
    pulled = registry.pull("judge", tmp_path / "pulled")
    from peft import PeftModel

    base, same, served = (
        load_model(find_base(tiny_base), quantization=quantization, dtype=torch.float32)  # type: ignore[arg-type]
        for _ in range(3)
    )
    ids = torch.tensor([probe.token_ids])
    model = PeftModel.from_pretrained(base, pulled).eval()
    with torch.inference_mode():
        adapted = model(ids).logits[0]
        with model.disable_adapter():
            bare = model(ids).logits[0]
    assert torch.equal(bare[:start], adapted[:start]), "the base's, to the bit"
    assert (bare[start:] - adapted[start:]).abs().max() > 1e-2
    top = adapted[-1, list(probe.top_token_ids)]
    assert torch.allclose(top, torch.tensor(probe.top_logits), atol=2e-4)

    for one in (same, served):
        keep_unpacked(one)
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(same, pulled).eval()(ids).logits[0, :-1]
    found = served_logprobs(tiny_base, registry, "judge", probe.token_ids, served)
    difference = (found - expected.log_softmax(-1)).abs().max()
    assert difference < SERVED_TOLERANCE[quantization]
    record_property("served", "alora")
    record_property(f"difference over {quantization}", f"{difference:.2e}")


def test_rows_without_the_invocation_are_not_measured(
    make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path, tiny_base: Path
) -> None:
    """The base's figures would stand under the adapter's name."""
    evaluation = {"skip_base": True, "num_golden_probes": 1}
    recipe = make_recipe(method=method(), training__max_steps=2, evaluation=evaluation)
    manifest = train(recipe, tmp_path / "out", reporter=quiet)
    subject = Subject(ref="out", folder=tmp_path / "out", manifest=manifest)
    other = prepare(make_recipe(task__template="{{ text }}:"))
    exam = Exam(name="other", recipe=other.recipe, examples=other.splits.test)
    with pytest.raises(InvalidRecipe, match="prompt 0 lacks the invocation"):
        list(
            measure(
                [subject],
                [exam],
                base=find_base(tiny_base),
                quantization=None,
                dtype=torch.float32,
                device="cpu",
                seed=0,
                reporter=quiet,
            )
        )


def test_positions_before_the_invocation_teach_it_nothing(
    make_recipe: MakeRecipe, tiny_base: Path
) -> None:
    """Gradients of A and B are those of the suffix: other words before it, whose keys the base gives."""
    from lorary.trainer.methods.attach import attach
    from lorary.trainer.methods.method import Setting

    run = prepare(make_recipe(method=method()))
    model = load_model(run.base, dtype=torch.float32)
    made = attach(
        model,
        run.recipe.method,
        gradient_checkpointing=False,
        setting=Setting(invocation=run.invocation),
    )
    prefix = torch.randint(3, 100, (1, 12))
    ids = torch.cat([prefix, torch.tensor([run.invocation])], dim=1)
    made.model(ids).logits[0, : prefix.shape[1]].sum().backward()
    grads = [p.grad for name, p in made.model.named_parameters() if "lora_" in name]
    assert all(grad is None or not grad.any() for grad in grads)
    made.model(ids).logits[0, -1].sum().backward()
    assert any(
        p.grad is not None and bool(p.grad.any())
        for name, p in made.model.named_parameters()
        if "lora_B" in name
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": method(invocation="")}, "never be on"),
        ({"method": method(invocation="judge:")}, "row 0 lacks the invocation"),
        ({"method": method(invocation="<|im_end|>")}, "fills rows up"),
        ({"method": method(), "training__packing": True}, "training.packing"),
        ({"method": method(), "training__gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_what_could_not_be_trained_is_refused_before_any_work(
    make_recipe: MakeRecipe, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRecipe, match=says):
        prepare(make_recipe(**changes))


def test_an_answer_that_holds_the_invocation_is_refused() -> None:
    check_rows([Row(input_ids=(7, 8, 1, 7), num_prompt=2)], "x", (7, 8))
    rows = [Row(input_ids=ids, num_prompt=2) for ids in ((7, 8, 1), (7, 8, 7, 8))]
    with pytest.raises(InvalidRecipe, match=r"row 1 holds method\.invocation"):
        check_rows(rows, "x", (7, 8))
