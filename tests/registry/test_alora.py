"""An aLoRA's invocation is part of what a version is: kept, named, exported, and never lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import pytest

from lorary.bases.adapted import compare_adapters
from lorary.errors import IncompatibleAdapter
from lorary.registry import Manifest, Registry
from lorary.registry.check import check_folder
from lorary.registry.export import export_gguf, export_merged
from tests.conftest import AdapterRecipe, build_adapter, write_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from lorary.registry import BaseCard
    from tests.registry.conftest import Forge

TOKENS = (70, 71, 72)
KEY = "alora_invocation_tokens"


@pytest.fixture(scope="module")
def pushed(
    tiny_base: Path, card: BaseCard, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Registry, Path]:
    """A registry, and the folder that is in it as ``judge``: with a scale to be folded, and no manifest."""
    root = tmp_path_factory.mktemp("alora")
    recipe = AdapterRecipe(rank=6, alpha=5, config={KEY: list(TOKENS)})
    folder = build_adapter(tiny_base, root / "judge", recipe)
    registry = Registry.open(root / "registry", create=True)
    registry.push(folder, "judge", base=card)
    return registry, folder


def test_the_version_says_when_it_is_on(
    pushed: tuple[Registry, Path], tiny_base: Path, card: BaseCard, tmp_path: Path
) -> None:
    registry, folder = pushed
    kept = registry.resolve("judge")
    method = registry.manifest(kept).method
    assert (method.name, method.invocation_tokens, method.is_activated) == ("alora", TOKENS, True)
    # Whatever a manifest beside it says, the configuration is what counts.
    write_manifest(tiny_base, folder)
    registry.push(folder, "described", base=card)
    assert registry.manifest(registry.resolve("described")).method.invocation_tokens == TOKENS
    # PEFT reads the canonical form as it read the original, invocation included.
    found = compare_adapters(tiny_base, folder, registry.fetch(kept))
    assert found.max_logit < 1e-4 < found.adapter_effect
    registry.pull("judge", tmp_path / "pulled")
    assert json.loads((tmp_path / "pulled" / "adapter_config.json").read_text())[KEY] == [*TOKENS]


def test_the_invocation_is_part_of_the_digest(
    forge: Forge, registry: Registry, card: BaseCard
) -> None:
    def digest(name: str, **config: Any) -> str:
        folder = forge.folder(name, config=forge.config(**config))
        return registry.push(folder, name, base=card).digest

    plain = digest("plain")
    assert digest("off", **{KEY: None}) == plain
    assert len({plain, digest("on", **{KEY: [1, 2]}), digest("other", **{KEY: [2, 1]})}) == 3
    config = json.loads(
        (registry.fetch(registry.resolve("plain")) / "adapter_config.json").read_text()
    )
    assert KEY not in config, "digests of what is always on stay what they were"


def test_manifests_name_it_only_where_there_is_one(pushed: tuple[Registry, Path]) -> None:
    registry, _ = pushed
    manifest = registry.manifest(registry.resolve("judge"))
    assert Manifest.from_json(manifest.to_json()) == manifest
    raw = json.loads(manifest.to_json())
    del raw["method"]["invocation_tokens"]
    plain = Manifest.from_json(json.dumps(raw))
    assert not plain.method.is_activated
    assert "invocation" not in plain.to_json(), "older readers refuse keys that they do not know"


def test_what_is_exported(
    pushed: tuple[Registry, Path], tiny_base: Path, card: BaseCard, tmp_path: Path
) -> None:
    registry, folder = pushed
    judge = registry.resolve("judge")
    export_gguf(registry, judge, tiny_base, card, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").fields
    assert fields["adapter.alora.invocation_tokens"].contents() == [*TOKENS]
    with pytest.raises(IncompatibleAdapter, match=r"'judge@1' is an aLoRA.*no weights are"):
        export_merged(registry, judge, tiny_base, card, tmp_path / "merged")
    verdicts = {v.server: v for v in check_folder(folder, card).canonical}
    assert verdicts["vllm"].outcome == "refuses"
    assert {v.outcome for s, v in verdicts.items() if s != "vllm"} == {"loads"}
