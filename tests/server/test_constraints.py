"""Answers that must fit a grammar do, in any company, drafted or not; what cannot be used is refused."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorary.errors import InvalidRequest
from lorary.server.engine.request import Constraint
from lorary.server.validate import MAX_CONSTRAINT_BYTES
from tests.conftest import RECIPES as ADAPTERS
from tests.conftest import build_adapter, build_llama
from tests.server.conftest import EngineWorld

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"enum": ["Ann", "Björn"]},
            "age": {"type": "integer", "minimum": 10, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)
PLATE = r"[A-Z]{2}-[0-9]{3,5} (red|blue)"
CASES = {
    "choice": Constraint("choice", json.dumps(["good", "bad", 'so "so"'])),
    "json": Constraint("json_schema", PERSON),
    "regex": Constraint("regex", PLATE),
    "lark": Constraint("lark", 'start: "the " animal " sat"\nanimal: "cat" | "dog"'),
}
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that can write any text."""
    return build_llama(tmp_path_factory.mktemp("bases") / "bytes-llama", every_byte=True)


@pytest.fixture(scope="module")
def world(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineWorld]:
    from lorary.registry import BaseCard, Registry
    from tests.conftest import write_manifest

    root = tmp_path_factory.mktemp("constraints")
    registry = Registry.open(root / "registry", create=True)
    folder = write_manifest(base, build_adapter(base, root / "alpha", ADAPTERS["alpha"]))
    registry.push(folder, "alpha", base=BaseCard.from_folder(base))
    opened = EngineWorld(base, registry, draft_rows=8)
    yield opened
    opened.close()


def fits(kind: str, text: str) -> bool:
    if kind == "choice":
        return text in json.loads(CASES[kind].text)
    if kind == "regex":
        return re.fullmatch(PLATE, text) is not None
    if kind == "lark":
        return text in ("the cat sat", "the dog sat")
    person = json.loads(text)
    return (
        set(person) == {"name", "age", "tags"}
        and person["name"] in ("Ann", "Björn")
        and 10 <= person["age"] <= 99
        and len(person["tags"]) <= 2
        and all(isinstance(tag, bool) for tag in person["tags"])
    )


def test_every_kind_fits_in_one_batch_and_free_rows_stay_as_they_are(world: EngineWorld) -> None:
    free: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    alone, _, _ = world.collector.wait(world.submit(PROMPT, "alpha", **free))
    asked = {
        (kind, seed): world.submit(
            PROMPT,
            "alpha" if seed == 1 else "",
            max_tokens=200,
            temperature=0.0 if seed == 0 else 1.5,
            seed=seed,
            constraint=constraint,
        )
        for seed in range(3)
        for kind, constraint in CASES.items()
    }
    beside = world.submit(PROMPT, "alpha", **free)
    for (kind, seed), request_id in asked.items():
        _, finish, error = world.collector.wait(request_id)
        assert error is None
        assert finish is not None
        assert (finish.reason, fits(kind, finish.text)) == ("stop", True), (kind, seed, finish.text)
    assert world.collector.wait(beside)[0] == alone


@pytest.mark.parametrize("kind", ["json", "regex"])
def test_drafts_change_nothing_and_what_is_forced_is_drafted(
    world: EngineWorld, base: Path, kind: str
) -> None:
    undrafted = EngineWorld(base, world.registry, draft_rows=0)
    try:
        said = []
        for one in (undrafted, world):
            request_id = one.submit(
                PROMPT, max_tokens=200, temperature=1.0, seed=7, constraint=CASES[kind]
            )
            tokens, finish, _ = one.collector.wait(request_id)
            assert finish is not None
            said.append(tokens)
        assert said[0] == said[1]
        if kind == "json":  # its names are known beforehand
            assert sum(stats.num_kept_tokens for stats in world.collector.steps) > 0
    finally:
        undrafted.close()


def test_an_answer_that_is_cut_off_is_the_beginning_of_one(world: EngineWorld) -> None:
    request_id = world.submit(PROMPT, max_tokens=3, constraint=CASES["json"])
    tokens, finish, error = world.collector.wait(request_id)
    assert error is None
    assert finish is not None
    assert (finish.reason, len(tokens)) == ("length", 3)
    assert finish.text.startswith("{")


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("regex", r"a(?=b)"), "look-around"),
        (Constraint("lark", "start: nowhere"), 'unknown name: "nowhere"'),
        (Constraint("json_schema", "{"), "json_schema cannot be used"),
        (Constraint("json_schema", '{"type": "objekt"}'), "Invalid type: objekt"),
        (Constraint("json_schema", '{"$ref": "http://127.0.0.1:1/x"}'), "does not fetch"),
        (Constraint("regex", "(" * 30_000), "cannot be used"),
        (Constraint("regex", ".*" * 2_000), "cannot be used"),
        (Constraint("json_schema", '{"allOf":' * 3_000 + "[{}]" + "}" * 3_000), "cannot be used"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_compiled_is_refused_in_the_compilers_words(
    world: EngineWorld, constraint: Constraint, says: str
) -> None:
    # Of this process: a machine that does something else meanwhile is no hostile grammar.
    started = time.process_time()
    with pytest.raises(InvalidRequest) as refused:
        world.grammars.submit(constraint).result()
    assert says in str(refused.value)
    assert refused.value.field == f"sampling.{constraint.kind}"
    assert time.process_time() - started < 5


CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4_500)) + 'r4500: "a"'
REFS = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1_400)}


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("lark", CHAIN),
        Constraint(
            "json_schema", json.dumps({"$ref": "#/$defs/d0", "$defs": {**REFS, "d1400": {}}})
        ),
    ],
    ids=lambda value: str(value.kind),
)
def test_long_chains_do_not_overflow_a_stack(world: EngineWorld, constraint: Constraint) -> None:
    """The compiler recurses over rules that name each other; a thread's usual stack ends with the process."""
    assert len(constraint.text) < MAX_CONSTRAINT_BYTES
    request_id = world.submit(PROMPT, max_tokens=8, constraint=constraint)
    _, finish, error = world.collector.wait(request_id)
    assert finish is not None or isinstance(error, InvalidRequest)


def test_a_grammar_that_nothing_can_follow_ends_its_own_answer_only(
    world: EngineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that is met between two tokens: the answer ends with an error, its neighbour goes on."""
    from lorary.server.engine import constraints

    monkeypatch.setitem(constraints.LIMITS, "step_max_items", 30)
    hostile = Constraint("lark", 'start: s\ns: s s s | "a" s | s "a" | "" | "a" | "b" s s')
    beside = world.submit(PROMPT, max_tokens=20, ignore_eos=True)
    bad = world.submit(PROMPT, max_tokens=40, constraint=hostile)
    _, finish, error = world.collector.wait(bad)
    assert finish is None
    assert isinstance(error, InvalidRequest)
    assert "constraint" in str(error)
    assert world.collector.wait(beside)[2] is None
    assert not world.collector.errors


def test_compiled_grammars_are_kept_and_their_number_is_bounded(world: EngineWorld) -> None:
    from lorary.server.engine.constraints import MAX_CACHED

    first = world.grammars.submit(CASES["json"]).result()
    assert world.grammars.submit(CASES["json"]).result() is first
    for i in range(MAX_CACHED):
        world.grammars.submit(Constraint("regex", f"a{i}")).result()
    assert world.grammars.submit(CASES["json"]).result() is not first


def test_a_bias_moves_a_choice_and_minus_a_hundred_forbids(world: EngineWorld) -> None:
    greedy, _, _ = world.collector.wait(world.submit(PROMPT, max_tokens=4, ignore_eos=True))
    for bias, wanted in (((9, 100.0),), [9] * 4), (((greedy[0], -100.0),), None):
        request_id = world.submit(PROMPT, max_tokens=4, ignore_eos=True, logit_bias=bias)
        tokens, _, _ = world.collector.wait(request_id)
        assert tokens == wanted if wanted else greedy[0] not in tokens


def test_a_mask_allows_what_fits_and_nothing_else(world: EngineWorld) -> None:
    matcher: Any = world.grammars.submit(Constraint("regex", "[ab]x")).result().matcher()
    logits = torch.zeros(len(world.tokenizer))
    matcher.apply(logits)
    allowed = {world.tokenizer.decode([i]) for i in (logits == 0).nonzero()[:, 0].tolist()}
    assert {"a", "b"} <= allowed <= {"a", "b", "ax", "bx"}
    (token,) = world.tokenizer("a")["input_ids"]
    assert matcher.consume(token) == ""
    assert world.tokenizer.decode(matcher.draft([], 4)) == "x"
