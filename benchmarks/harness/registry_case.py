"""One figure of the ``registry`` benchmark, taken in this process: ``registry_case CASE FOLDER``.

Prints one JSON object: ``figure``, and what it is made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.registry import BaseCard, Registry

if TYPE_CHECKING:
    from collections.abc import Callable

_RANK = 256
_WIDTH = 2048
_WIDE = 28_672
"""As the widest layers of models with 70 billion weights: tensors of 29 MB."""
_ADAPTERS = 100
_MEMORY_BYTES = 5_000_000_000


def card_of(num_bytes: int, width: int = _WIDTH) -> BaseCard:
    """Return a base whose adapters of rank 256 in float32 have about ``num_bytes``."""
    count = max(1, num_bytes // (2 * 4 * _RANK * width))
    modules = {f"model.layers.{i}.self_attn.q_proj": (width, width) for i in range(count)}
    return BaseCard(
        name="synthetic",
        fingerprint=f"sha256:{1:064x}",
        architecture="LlamaForCausalLM",
        hidden_size=width,
        num_layers=count,
        vocab_size=1000,
        modules=modules,
        head_modules=("lm_head",),
    )


def make_adapter(folder: Path, card: BaseCard) -> Path:
    """Write an adapter for ``card``, with a scale of 2 that a push folds into B."""
    import numpy as np

    from lorary.registry.safetensors_file import write

    folder.mkdir()
    generator = np.random.default_rng(0)
    float32 = np.dtype("<f4")
    layout: dict[str, Any] = {}
    for module, (rows, columns) in card.modules.items():
        layout[f"base_model.model.{module}.lora_A.weight"] = (float32, (_RANK, columns))
        layout[f"base_model.model.{module}.lora_B.weight"] = (float32, (rows, _RANK))

    def load(name: str) -> Any:
        # Small, so that no check of an adapter's size beside its base's weights has to say anything.
        return generator.standard_normal(layout[name][1], dtype=np.float32) * np.float32(1e-3)

    with (folder / "adapter_model.safetensors").open("wb") as file:
        write(file, layout, load, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/synthetic",
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def transfer(work: Path) -> dict[str, float]:
    """Push and pull 100 MB beside what the system's own tools take."""
    card = card_of(100_000_000)
    folder = make_adapter(work / "adapter", card)
    file, copy = folder / "adapter_model.safetensors", work / "copy"
    os.sync()

    def tools(*, synced: bool) -> float:
        seconds = timed(lambda: subprocess.run(["cp", file, copy], check=True))
        if synced:
            seconds += timed(lambda: subprocess.run(["sync", copy], check=True))
        seconds += timed(
            lambda: subprocess.run(["sha256sum", copy], check=True, stdout=subprocess.DEVNULL)
        )
        copy.unlink()
        return seconds

    registry = Registry.open(work / "registry", create=True)
    plain, synced = tools(synced=False), tools(synced=True)
    push = timed(lambda: registry.push(folder, "a", base=card))
    pull = timed(lambda: registry.pull("a", work / "out"))
    return {
        "figure": (push + pull) / plain,
        "beside_synced": (push + pull) / synced,
        "push_s": push,
        "pull_s": pull,
        "plain_s": plain,
        "synced_s": synced,
    }


def fill(root: Path, count: int) -> Registry:
    """Make a registry of ``count`` versions whose manifests are there and whose tensors are not."""
    from lorary.registry.local import LocalStore
    from lorary.registry.manifest import BaseIdentity, FileEntry, Manifest, Method, Metrics, Task
    from lorary.registry.summaries import Summaries
    from lorary.registry.versions import Pointer

    LocalStore(root, create=True)
    entry = FileEntry(path="adapter_model.safetensors", size=100, sha256="0" * 64)
    for number in range(_ADAPTERS):
        name = f"adapter-{number}"
        adapter = root / "adapters" / name
        (adapter / "versions").mkdir(parents=True)
        versions = []
        for version in range(1, count // _ADAPTERS + 1):
            content = hashlib.sha256(f"{number}-{version}".encode()).hexdigest()
            manifest = Manifest(
                base=BaseIdentity(name="b", fingerprint="sha256:" + "1" * 64, architecture="L"),
                method=Method(name="lora", rank=8, alpha=8.0, target_modules=("q_proj",)),
                task=Task(),
                metrics=Metrics(
                    primary="accuracy",
                    num_examples=100,
                    base={"accuracy": 0.1},
                    adapter={"accuracy": 0.9},
                ),
                name=name,
                version=version,
                digest=f"sha256:{content}",
                files=(entry,),
            )
            raw = manifest.to_json().encode()
            sha256 = hashlib.sha256(raw).hexdigest()
            blob = root / "blobs" / "sha256" / sha256[:2] / sha256
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(raw)
            pointer = Pointer(
                version=version,
                digest=manifest.digest,
                manifest_sha256=sha256,
                manifest_size=len(raw),
                created_at="2026-01-01T00:00:00Z",
            )
            (adapter / "versions" / f"{version}.json").write_bytes(pointer.to_json())
            versions.append((pointer, manifest))
        Summaries(adapter, root / "blobs" / "sha256").append(versions)
    return Registry.open(root)


def listing(work: Path) -> dict[str, float]:
    """List 10,000 versions of 100 adapters, all of them for the first time in this process."""
    registry = fill(work / "registry", 10_000)
    found: list[Any] = []
    seconds = timed(lambda: found.extend(registry.list()))
    assert len(found) == 10_000
    return {"figure": seconds}


def resolve(work: Path) -> dict[str, float]:
    """Resolve names, aliases and versions of a registry that has been asked before."""
    registry = fill(work / "registry", 1_000)
    registry.set_alias("adapter-7", "prod", 3)
    refs = ("adapter-7", "adapter-7@prod", "adapter-7@3")
    times = [timed(lambda ref=ref: registry.resolve(ref)) for _ in range(500) for ref in refs]  # type: ignore[misc]
    return {"figure": 1e3 * sorted(times[len(refs) :])[len(times) // 2]}


def help_text(work: Path) -> dict[str, float]:
    """Start the command for its help: what it imports is what it takes."""
    command = [sys.executable, "-m", "lorary.registry", "--help"]
    times = [
        timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        for _ in range(5)
    ]
    return {"figure": sorted(times)[2]}


def share(work: Path) -> dict[str, float]:
    """Push a version that differs from the one before in its description of the task only."""
    from lorary.registry.manifest import BaseIdentity, Manifest, Method, Task

    card = card_of(20_000_000)
    folder = make_adapter(work / "adapter", card)
    registry = Registry.open(work / "registry", create=True)

    def stored() -> dict[str, int]:
        return {
            str(p): p.stat().st_size
            for p in (work / "registry" / "blobs").rglob("*")
            if p.is_file()
        }

    def push(template: str) -> int:
        manifest = Manifest(
            base=BaseIdentity(name="b", fingerprint=card.fingerprint, architecture="L"),
            method=Method(name="lora", rank=_RANK, alpha=2.0 * _RANK, target_modules=("q_proj",)),
            task=Task(template=template),
        )
        (folder / "manifest.json").write_text(manifest.to_json())
        return registry.push(folder, "a", base=card).version

    assert push("{{ text }}") == 1
    before = stored()
    assert push("{{ text }}!") == 2
    added = {path: size for path, size in stored().items() if path not in before}
    resolved = registry.resolve("a@2")
    manifest_bytes = (registry.fetch(resolved) / "manifest.json").stat().st_size
    return {"figure": float(sum(added.values()) - manifest_bytes)}


def memory(work: Path) -> dict[str, float]:
    """Push and pull 5 GB; the adapter is made by another process, whose memory does not count."""
    subprocess.run([sys.executable, "-m", __spec__.name, "make", str(work / "adapter")], check=True)
    card = card_of(_MEMORY_BYTES, _WIDE)
    registry = Registry.open(work / "registry", create=True)
    push = timed(lambda: registry.push(work / "adapter", "a", base=card))
    pushed = _peak_mb()
    pull = timed(lambda: registry.pull("a", work / "out"))
    return {"figure": _peak_mb(), "pushed_mb": pushed, "push_s": push, "pull_s": pull}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


_CASES = {
    "transfer": transfer,
    "list": listing,
    "resolve": resolve,
    "help": help_text,
    "share": share,
    "memory": memory,
}

if __name__ == "__main__":
    if sys.argv[1] == "make":
        make_adapter(Path(sys.argv[2]), card_of(_MEMORY_BYTES, _WIDE))
        sys.exit()
    found = _CASES[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(json.dumps({key: round(value, 4) for key, value in found.items()}))
