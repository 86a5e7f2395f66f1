"""Evaluation: batched answers are those of one at a time, scores those of the formula."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.trainer.encoding import Row
from lorary.trainer.evaluate import Evaluator, _by_length
from lorary.trainer.methods.attach import attach
from lorary.trainer.train import prepare

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorary.trainer.recipe import Recipe

PROMPTS = [[1, 9, 12, 40], [1, 30, 31, 8, 22, 7, 15], [1, 5]]


@pytest.fixture
def model(make_recipe: Callable[..., Recipe]) -> Any:
    from lorary.bases import find_base
    from lorary.bases.load import load_model

    recipe = make_recipe()
    base = load_model(find_base(recipe.base), dtype=torch.float32, attn_implementation="eager")
    wrapped = attach(base, recipe.method, gradient_checkpointing=False).model
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return wrapped


def evaluator(model: Any, recipe: Recipe) -> Evaluator:
    prepared = prepare(recipe)
    return Evaluator(model, prepared.tokenizer, prepared.builder, recipe)


def test_batched_answers_are_those_of_one_at_a_time(
    model: Any, make_recipe: Callable[..., Recipe]
) -> None:
    task = {"template": "{{ text }}", "max_new_tokens": 8}
    one = evaluator(model.eval(), make_recipe(task=task, evaluation={"metric": "rouge"}))
    texts, first = one.generate(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone, logits = one.generate([prompt])
        assert alone == [texts[i]]
        torch.testing.assert_close(logits[0], first[i], atol=1e-4, rtol=1e-4)


def test_label_scores_are_sums_of_token_log_probabilities(
    model: Any, make_recipe: Callable[..., Recipe]
) -> None:
    one = evaluator(model.eval(), make_recipe())
    labels = [(40,), (7, 8, 9), (22, 5)]
    _, first = one.generate(PROMPTS)
    scores = one.label_logprobs(PROMPTS, labels, first)
    with torch.inference_mode():
        for i, prompt in enumerate(PROMPTS):
            for k, label in enumerate(labels):
                logits = model(torch.tensor([[*prompt, *label]])).logits[0].log_softmax(-1)
                expected = sum(logits[len(prompt) - 1 + j, token] for j, token in enumerate(label))
                assert scores[i, k].item() == pytest.approx(float(expected), abs=1e-3)


def test_perplexity_reads_the_answers_alone(
    model: Any, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nats of each answer's own tokens after its prompt; neither batch nor padding changes them."""
    monkeypatch.setattr("lorary.trainer.evaluate._MAX_LOGIT_ROWS", 5)
    answers = [(40, 2), (7, 8, 9, 2), (22, 2)]
    with torch.inference_mode():
        found = evaluator(model.eval(), make_recipe()).nats(
            [
                Row(input_ids=(*prompt, *answer), num_prompt=len(prompt))
                for prompt, answer in zip(PROMPTS, answers, strict=True)
            ]
        )
        for prompt, answer, nats in zip(PROMPTS, answers, found, strict=True):
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            start = len(prompt) - 1
            expected = -sum(logits[start + j, token] for j, token in enumerate(answer))
            assert nats == pytest.approx(float(expected), abs=1e-3)


def test_evaluation_leaves_the_model_as_it_was(
    model: Any, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe()
    model.train()
    done: list[int] = []
    result = evaluator(model, recipe).evaluate(prepare(recipe).splits.test, done.append)
    assert model.training
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert sum(done) == len(result.predictions) == 12
    assert set(result.predictions) <= {"good", "bad"}
    assert set(result.metrics) == {"accuracy", "f1", "exact", "ece", "perplexity"}
    assert all(sum(row) == pytest.approx(1) for row in result.label_probabilities)


def test_answers_end_at_a_stop_string(model: Any, make_recipe: Callable[..., Recipe]) -> None:
    task = {"template": "{{ text }}", "max_new_tokens": 12}
    recipe = make_recipe(task=task, evaluation={"metric": "rouge"})
    (whole, *_), _ = evaluator(model.eval(), recipe).generate(PROMPTS)
    assert len(whole) > 3
    stop = whole[2:4]
    recipe = make_recipe(task={**task, "stop": [stop]}, evaluation={"metric": "rouge"})
    (cut, *_), _ = evaluator(model, recipe).generate(PROMPTS)
    assert cut == whole[: whole.find(stop)].strip()


def test_batches_hold_prompts_of_like_length() -> None:
    batches = list(_by_length([[0] * n for n in (3, 9, 1, 7)], 2))
    assert batches == [[1, 3], [0, 2]]


def test_generation_task_is_scored_as_text(
    model: Any, make_recipe: Callable[..., Recipe], reviews: Path
) -> None:
    recipe = make_recipe(
        task={"template": "{{ text }}", "max_new_tokens": 4}, evaluation={"metric": "bleu"}
    )
    result = evaluator(model, recipe).evaluate(prepare(recipe).splits.test)
    assert set(result.metrics) == {"bleu", "chrf", "perplexity"}
    assert result.predictions == result.generated
