"""Golden probes on a real engine: what passes, what is found out, what is never used, who notices."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorary.errors import CorruptArtifact, LoraryError
from lorary.registry.manifest import GoldenProbe, Manifest
from lorary.server.adapters.probes import LIMITS, divergence, divergence_limit, usable_probes
from lorary.server.adapters.quarantine import Quarantine
from lorary.server.native import library as native
from tests.conftest import wait_until
from tests.server.conftest import EngineWorld, registry_of, worlds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lorary.registry import Registry
    from lorary.server.adapters.probe_runs import Verdict

PROMPTS = ([5, 6, 7, 8, 9], [40, 41, 42], [90, 17, 18, 19, 20, 21, 22])
HEALTHY = ("alpha", "bravo", "echo")
"""Of ranks 4, 8 and 33, the last with rsLoRA."""


def recorded(base: Path, folder: Path, suffix: Sequence[int] = ()) -> tuple[GoldenProbe, ...]:
    """Return what the trainer would have written: PEFT's logits in float32; ``suffix`` ends every prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    probes = []
    for prompt in ([*prompt, *suffix] for prompt in PROMPTS):
        with torch.inference_mode():
            top = model(torch.tensor([prompt])).logits[0, -1].float().topk(16)
        probes.append(
            GoldenProbe(
                token_ids=tuple(prompt),
                top_token_ids=tuple(top.indices.tolist()),
                top_logits=tuple(round(v, 4) for v in top.values.tolist()),
                dtype="float32",
            )
        )
    return tuple(probes)


def with_probes(source: Path, to: Path, probes: tuple[GoldenProbe, ...]) -> Path:
    shutil.copytree(source, to)
    manifest = Manifest.from_json((to / "manifest.json").read_text())
    probed = dataclasses.replace(manifest, golden_probes=probes)
    (to / "manifest.json").write_text(probed.to_json())
    return to


@pytest.fixture(scope="module")
def probed(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    """Healthy versions with probes; ``exchanged``: bravo's probes over other tensors; and ``silent``."""
    root = tmp_path_factory.mktemp("probed")
    probes = {name: recorded(tiny_base, tiny_adapters[name]) for name in HEALTHY}
    folders = {
        name: with_probes(tiny_adapters[name], root / name, probes[name]) for name in HEALTHY
    }
    # Of the right shapes, ranks and modules, finite, hashed: every check of files passes.
    exchanged = with_probes(tiny_adapters["bravo"], root / "exchanged", probes["bravo"])
    tensors = load_file(exchanged / "adapter_model.safetensors")
    rolled = {k: v.roll(1, 0) if "lora_B" in k else v for k, v in tensors.items()}
    save_file(rolled, exchanged / "adapter_model.safetensors")
    folders |= {"exchanged": exchanged, "silent": tiny_adapters["delta"]}
    return registry_of(root, tiny_base, folders)


class Verdicts:
    """Told of verdicts, by name; and of what the log says."""

    def __init__(self) -> None:
        self.by_name: dict[str, Verdict] = {}

    def on_verify(self, name: str, verdict: Verdict) -> None:
        assert name not in self.by_name, "probed twice"
        self.by_name[name] = verdict


@pytest.fixture
def make_probed(tiny_base: Path, probed: Registry) -> Iterator[Callable[..., EngineWorld]]:
    with worlds(tiny_base, probed) as make:
        yield make


def load(world: EngineWorld, name: str) -> None:
    world.residency.load(world.registry.resolve(name), timeout_s=60)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_healthy_versions_pass_and_an_exchanged_one_is_quarantined(
    make_probed: Callable[..., EngineWorld], tiny_base: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    kernels = native.load()
    if kind == "int8" and not (isinstance(kernels, native.NativeKernels) and kernels.has_int8):
        pytest.skip("this CPU has no product with 8-bit weights")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype)
    seen = Verdicts()
    world = make_probed(
        model=model,
        dtype=dtype,
        int8=kind == "int8",
        verify="enforce",
        quantization="int8" if kind == "int8" else "none",
        verification_observer=seen,
    )
    reads = count_reads(world)
    for _ in range(3):
        with pytest.raises(CorruptArtifact, match="golden probes"):
            load(world, "exchanged")
    assert reads == ["exchanged"]
    for name in (*HEALTHY, "silent"):
        load(world, name)
    assert {name: v.state for name, v in seen.by_name.items()} == {
        **dict.fromkeys(HEALTHY, "passed"),
        "silent": "no probes",
        "exchanged": "failed",
    }
    limit = LIMITS[kind]
    worst = max(seen.by_name[name].divergence for name in HEALTHY)
    assert worst < limit / 2 < limit * 2 < seen.by_name["exchanged"].divergence
    assert seen.by_name["alpha"].limit == limit
    assert {r.name for r in world.residency.snapshot()} == {*HEALTHY, "silent"}
    assert world.lora.pool.used_bytes == sum(r.device_bytes for r in world.residency.snapshot())
    # Read again only when somebody says so, and found out again.
    digest = world.registry.resolve("exchanged").digest
    assert world.residency.quarantined() == (digest,)
    seen.by_name.clear()
    world.residency.readmit(digest)
    with pytest.raises(CorruptArtifact):
        load(world, "exchanged")
    assert reads.count("exchanged") == 2
    assert world.residency.quarantined() == (digest,)


def count_reads(world: EngineWorld) -> list[str]:
    reads: list[str] = []
    read = world.residency._load

    def counted(resolved: Any) -> Any:
        reads.append(resolved.name)
        return read(resolved)

    world.residency._load = counted  # type: ignore[method-assign]
    return reads


def test_with_enforce_nobody_is_served_by_what_has_not_passed(
    make_probed: Callable[..., EngineWorld],
) -> None:
    """Calls wait for the probes; those of the bad one end with its error, and others never notice."""
    options: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, "logprobs": 0}
    alone = make_probed(draft_rows=0)
    names = ["", "alpha", "bravo", "silent"]
    expected = {n: alone.collector.logprobs(alone.submit([7, 8, 9], n, **options)) for n in names}
    # Begun when all have asked: else the bad one may be in quarantine before the last asks for it.
    world = make_probed(draft_rows=0, verify="enforce", max_batch=5, start=False)
    ids = {n: world.submit([7, 8, 9], n, **options) for n in ("", "alpha")}
    bad = [world.submit([7, 8, 9], "exchanged", **options) for _ in range(3)]
    ids |= {n: world.submit([7, 8, 9], n, **options) for n in ("bravo", "silent")}
    world.engine.start()
    for request_id in bad:
        tokens, _, error = world.collector.wait(request_id)
        assert isinstance(error, CorruptArtifact)
        assert tokens == []
    for name, request_id in ids.items():
        assert world.collector.logprobs(request_id) == expected[name], name or "base"
    # Nothing of the probes leaves the verifier, and nothing of them stays.
    assert {key[0] for key in world.collector.outputs} == {*ids.values(), *bad}
    assert world.engine.num_running == world.engine.num_waiting == 0
    cached = vars(world.engine)["_places"].blocks._roots
    assert not any(digest.startswith("probe/") for digest, _ in cached)


def test_a_full_queue_does_not_keep_probes_out(make_probed: Callable[..., EngineWorld]) -> None:
    """Those in the queue wait for the adapter, and the adapter for its probes."""
    world = make_probed(verify="enforce", max_waiting=1, start=False)
    request_id = world.submit([7, 8], "alpha", max_tokens=2)
    world.engine.start()
    assert world.collector.wait(request_id)[2] is None


def test_warn_serves_and_says_so(
    make_probed: Callable[..., EngineWorld], caplog: pytest.LogCaptureFixture
) -> None:
    seen = Verdicts()
    world = make_probed(verify="warn", verification_observer=seen)
    for name in ("exchanged", "alpha"):
        tokens, _, error = world.collector.wait(world.submit([7, 8, 9], name, max_tokens=3))
        assert error is None
        assert len(tokens) == 3
    # The lowest priority: they come after everybody, here by the time that these two have ended.
    wait_until(lambda: set(seen.by_name) == {"exchanged", "alpha"})
    assert seen.by_name["exchanged"].state == "failed"
    assert seen.by_name["alpha"].state == "passed"
    assert not world.residency.quarantined()
    assert world.residency.verdict(world.registry.resolve("exchanged").digest) is not None
    # Logged after the observer was told.
    says = "'exchanged@1' has failed its 3 golden probes"
    wait_until(
        lambda: any(says in r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    )
    wait_until(lambda: all(r.num_holders == 0 for r in world.residency.snapshot()))
    # Once per digest, however often it is loaded: the observer refuses a second time.
    world.residency.unload(world.registry.resolve("alpha").digest)
    load(world, "alpha")
    assert world.collector.wait(world.submit([7, 8, 9], "alpha", max_tokens=3))[2] is None


def test_probes_that_cannot_be_replayed_count_as_failed(
    make_probed: Callable[..., EngineWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest with ids beyond the vocabulary: with ``warn`` served and said, with ``enforce`` refused."""
    world, strict = make_probed(verify="warn"), make_probed(verify="enforce")
    for one in (world, strict):
        verifier = one.residency._verifier
        assert verifier is not None
        monkeypatch.setattr(verifier._runs, "_vocab_size", 10)
    resolved = world.registry.resolve("alpha")
    load(world, "alpha")
    wait_until(lambda: world.residency.verdict(resolved.digest) is not None)
    verdict = world.residency.verdict(resolved.digest)
    assert verdict is not None
    assert verdict.state == "failed"
    assert world.collector.wait(world.submit([7], "alpha", max_tokens=1))[2] is None
    with pytest.raises(CorruptArtifact, match="golden probe 0"):
        load(strict, "alpha")
    assert strict.residency.quarantined() == (resolved.digest,)


def test_a_server_that_stops_lets_go_of_those_who_wait_for_probes(
    make_probed: Callable[..., EngineWorld],
) -> None:
    """The engine never runs: the load must end all the same, and is not held against the version."""
    world = make_probed(verify="enforce", start=False)
    lease = world.residency.acquire(world.registry.resolve("alpha"))
    wait_until(lambda: world.engine.num_waiting > 0)
    world.close()
    assert isinstance(lease.error, LoraryError)
    assert not lease.is_ready
    assert not world.residency.quarantined()


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": (5, 160)},
        {"token_ids": ()},
        {"top_token_ids": (1, -1)},
        {"top_token_ids": (1, 1)},
        {"top_logits": (1.0,)},
        {"top_token_ids": (3,), "top_logits": (1.0,)},
    ],
)
def test_a_manifests_probes_are_checked_before_the_engine_sees_them(
    tiny_adapters: dict[str, Path], change: dict[str, Any]
) -> None:
    raw = json.loads((tiny_adapters["alpha"] / "manifest.json").read_text())
    good = {
        "token_ids": (5,),
        "top_token_ids": (1, 2),
        "top_logits": (1.0, 0.5),
        "dtype": "float32",
    }
    for probe, is_good in (({**good, **change}, False), (good, True)):
        manifest = Manifest.from_json(json.dumps({**raw, "golden_probes": [probe]}))
        if is_good:
            assert len(usable_probes(manifest, vocab_size=160, max_context=8)) == 1
            assert not usable_probes(manifest, vocab_size=160, max_context=1)
        else:
            with pytest.raises(CorruptArtifact, match="golden probe 0"):
                usable_probes(manifest, vocab_size=160, max_context=8)


def test_divergence_on_paper() -> None:
    """p = (3/4, 1/4) recorded; q = (1/4, 3/4) served, with mass elsewhere: 1/2 ln 3."""
    probe = GoldenProbe(
        token_ids=(1,), top_token_ids=(4, 5), top_logits=(1.0986122886681098, 0.0), dtype="float32"
    )
    assert divergence(probe, (-2.0, -2.0 + 1.0986122886681098)) == pytest.approx(0.5493061443340549)
    assert divergence(probe, (-1.0, -1.0 - 1.0986122886681098)) == pytest.approx(0.0, abs=1e-12)
    assert divergence(probe, (-1.0, float("-inf"))) == float("inf")
    assert divergence(probe, (float("nan"), -1.0)) == float("inf")
    assert divergence_limit(["none", "bfloat16", "int8"]) == LIMITS["int8"]


def test_a_quarantine_is_bounded() -> None:
    quarantine = Quarantine(limit=2)
    for digest in ("a", "b", "c"):
        quarantine.add(digest, CorruptArtifact(digest))
    assert quarantine.digests() == ("b", "c")
    quarantine.check("a")
    with pytest.raises(CorruptArtifact, match="b"):
        quarantine.check("b")
    assert quarantine.lift("b")
    assert not quarantine.lift("b")
    quarantine.check("b")
