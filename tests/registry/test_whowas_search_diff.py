"""Questions about what is kept: who was it, which fit, what changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorary.errors import AdapterNotFound, InvalidRef, InvalidRequest
from lorary.registry import Registry
from lorary.registry.aliases import UNSET, AliasMove
from lorary.registry.diff import diff_versions
from lorary.registry.manifest import Metrics
from lorary.registry.search import search
from lorary.registry.versions import Pointer
from lorary.registry.weight_diff import compare_weights, total_change
from lorary.registry.whowas import whowas

if TYPE_CHECKING:
    from tests.registry.conftest import Forge, Tensors


def product(tensors: Tensors, module: str) -> np.ndarray:
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return b.astype(np.float64) @ a.astype(np.float64)


@pytest.fixture
def shelf(forge: Forge, registry: Registry) -> Registry:
    """``sentiment`` 1 and 2, ``chat`` 1; metrics of the first two."""
    for name, seed, accuracy in (("sentiment", 1, 0.8), ("sentiment", 2, 0.9), ("chat", 3, None)):
        manifest = forge.manifest(
            kind="generation" if accuracy is None else "classification",
            labels=() if accuracy is None else ("good", "bad"),
        )
        metrics = None
        if accuracy is not None:
            figures = {"accuracy": accuracy}
            metrics = Metrics(primary="accuracy", num_examples=100, base={}, adapter=figures)
        data = {"source": "Movie-Reviews", "fingerprint": f"sha256:{seed}"}
        manifest = dataclasses.replace(manifest, metrics=metrics, data=data)
        folder = forge.folder(f"{name}{seed}", seed=seed, manifest=manifest)
        registry.push(folder, name, base=forge.card, description=f"the {name} one")
    return registry


def test_who_was_it(shelf: Registry) -> None:
    before = None
    for day, version in ((3, 1), (5, 2), (7, None), (9, 1)):
        move = AliasMove(
            at=f"2026-01-0{day}T12:00:00Z",
            actor="ada",
            alias="prod",
            from_version=before,
            to_version=version,
        )
        before = version
        shelf.store.move_alias("sentiment", move, expect=UNSET)
    for at, version, since, until in (
        ("2026-01-03T12:00", 1, 3, 5),
        ("2026-01-05T12:59:59+01:00", 1, 3, 5),  # a second before noon in UTC
        ("2026-01-05T12:00:00Z", 2, 5, 7),
        ("2026-01-06", 2, 5, 7),
        ("2026-01-10", 1, 9, None),
    ):
        held = whowas(shelf, "sentiment", "prod", at)
        assert (held.version, held.since) == (version, f"2026-01-0{since}T12:00:00Z"), at
        assert held.until == (until and f"2026-01-0{until}T12:00:00Z")
        assert held.digest == shelf.resolve(f"sentiment@{version}").digest
    for at in ("2026-01-03", "2026-01-08"):
        with pytest.raises(AdapterNotFound, match=f"nowhere at {at}T00:00:00Z"):
            whowas(shelf, "sentiment", "prod", at)
    with pytest.raises(InvalidRequest, match="is no time"):
        whowas(shelf, "sentiment", "prod", "yesterday")
    with pytest.raises(InvalidRequest, match="lies ahead"):
        whowas(shelf, "sentiment", "prod", "2999-01-01")


def test_who_was_the_latest(forge: Forge, registry: Registry) -> None:
    digest = registry.push(forge.folder(), "a", base=forge.card).digest
    pointer = registry.store.pointer("a", 1)
    assert pointer is not None
    for version in (2, 3):
        staged = Pointer(
            version=version,
            digest=digest,
            manifest_sha256=pointer.manifest_sha256,
            manifest_size=pointer.manifest_size,
            created_at=f"2026-01-0{version}T00:00:00Z",
        )
        file = Path(registry.url.removeprefix("file://")) / f"adapters/a/versions/{version}.json"
        file.write_bytes(staged.to_json())
    assert whowas(registry, "a", "latest", "2026-01-02T10:00").version == 2
    deleted = registry.delete("a@3")
    held = whowas(registry, "a", "latest", "2026-01-04")
    assert (held.version, held.until) == (3, deleted.at)
    assert "deleted" not in held.deleted
    assert held.deleted.startswith("on ")


def test_search_finds_what_fits_all_terms(shelf: Registry) -> None:
    def found(*terms: str, **options: Any) -> list[str]:
        return [f"{i.name}@{i.version}" for i in search(shelf, terms, **options).versions]

    assert found() == ["chat@1", "sentiment@1", "sentiment@2"]
    assert found("accuracy>0.5") == ["sentiment@2", "sentiment@1"]  # largest first
    assert found("accuracy>0.5", sort="name") == ["sentiment@1", "sentiment@2"]
    assert found("accuracy>=0.9") == found("task=classification", "version>1") == ["sentiment@2"]
    assert found("CHAT") == found("name=c*") == found("task=Generation") == ["chat@1"]
    assert found("movie", "rank<=4", "label=good", "examples==100") == [
        "sentiment@1", "sentiment@2"
    ]  # fmt: skip
    assert found("base=*tiny*", "module=q_proj", "accuracy<0.85") == ["sentiment@1"]
    assert found("rank>4") == found("alias=prod") == []
    assert search(shelf, ["recall>0"]).unknown == ("recall",)
    assert search(shelf, ["recall>0"]).known == ("accuracy",)
    assert [i.version for i in search(shelf, ["movie"], is_latest=True).versions] == [1, 2]
    with pytest.raises(InvalidRequest, match="no field 'colour'"):
        found("colour=red")


def test_modules_are_compared_as_their_products_would_be(forge: Forge, tmp_path: Path) -> None:
    one = forge.tensors(seed=1, rank=4)
    two = forge.tensors(seed=2, rank=6)
    modules = [key.split(".lora")[0].removeprefix("base_model.model.") for key in one][::2]
    kept, changed = modules
    for side in "AB":
        key = f"base_model.model.{kept}.lora_{side}.weight"
        two[key] = one[key]
    extra = {key.replace("q_proj", "k_proj"): value for key, value in one.items() if kept in key}
    files = [
        forge.folder(name, tensors=tensors) / "adapter_model.safetensors"
        for name, tensors in (("one", one), ("two", {**two, **extra}))
    ]
    found = compare_weights(*files)
    assert [(c.module, c.kind) for c in found] == [
        (kept.replace("q_proj", "k_proj"), "added"),
        (changed, "changed"),
        (kept, "same"),
    ]
    before, after = product(one, changed), product(two, changed)
    change = found[1]
    assert change.norm_before == pytest.approx(np.linalg.norm(before))
    assert change.norm_after == pytest.approx(np.linalg.norm(after))
    assert change.norm_change == pytest.approx(np.linalg.norm(after - before))
    assert change.change == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before))
    spaces = [np.linalg.svd(m)[0][:, :rank] for m, rank in ((before, 4), (after, 6))]
    cosines = np.linalg.svd(spaces[0].T @ spaces[1])[1]
    assert change.overlap == pytest.approx((cosines**2).sum() / 4)
    values = np.linalg.svd(before)[1][:4]
    shares = values / values.sum()
    assert change.effective_rank_before == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert total_change(found) is not None
    assert found[2].change == 0.0
    assert found[2].overlap == pytest.approx(1.0)


def test_a_factorization_is_no_change_and_a_tiny_one_is_seen(forge: Forge) -> None:
    """B·A is compared, not B and A; and a difference of a millionth is not lost in squares of norms."""
    one = forge.tensors(seed=1)
    turned, nudged = dict(one), dict(one)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    for key in one:
        turn = rotation.T @ one[key] if "lora_A" in key else one[key] @ rotation
        turned[key] = turn.astype(np.float32)
        nudged[key] = one[key] * np.float32(1 + 1e-6) if "lora_B" in key else one[key]
    files = [
        forge.folder(name, tensors=tensors) / "adapter_model.safetensors"
        for name, tensors in (("one", one), ("turned", turned), ("nudged", nudged))
    ]
    for change in compare_weights(files[0], files[1]):
        assert change.change == pytest.approx(0, abs=1e-6)
        assert change.overlap == pytest.approx(1)
    for change in compare_weights(files[0], files[2]):
        assert change.change == pytest.approx(1e-6, rel=0.1)


def test_a_diff_says_everything_that_changed(shelf: Registry) -> None:
    found = diff_versions(shelf, "sentiment@1", "@2")
    assert found.summary.startswith("sentiment@1 → sentiment@2: 2 of 2 modules changed; ‖ΔBA‖ is ")
    assert "accuracy 0.8 → 0.9 (+0.1); other data; config, base and task are the same" in (
        found.summary
    )
    assert [(c.key, c.before, c.after) for c in found.data] == [
        ("fingerprint", "sha256:1", "sha256:2")
    ]
    (metric,) = found.metrics
    assert (metric.before, metric.after, metric.is_primary) == (0.8, 0.9, True)
    across = diff_versions(shelf, "sentiment", "chat")
    assert "accuracy is known before only" in across.summary
    assert {change.key for change in across.task} == {"kind", "labels"}
    same = diff_versions(shelf, "chat@1", "chat")
    assert "the same weights; the same data" in same.summary
    assert not any((same.config, same.base, same.task, same.data, same.training, same.metrics))
    with pytest.raises(AdapterNotFound):
        diff_versions(shelf, "sentiment@1", "@9")
    with pytest.raises(InvalidRef):
        diff_versions(shelf, "sentiment@1", "../x")
