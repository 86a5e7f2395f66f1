"""The model card of a version on a Hub: what makes it found, and what people read first.

The card is ``README.md`` with metadata in front. What the adapter's own README says is kept: its text, and
every key of its metadata that the registry does not know better.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import yaml

from lorary.registry.folder import CONFIG_FILE, README_FILE, REPORT_FOLDER, REPORT_PAGE
from lorary.registry.manifest import Manifest, Metrics, TaskKind, is_lower_better

TAG: Final = "lorary"
"""By which a Hub finds the adapters of registries among an owner's models."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_PIPELINES: Final[dict[TaskKind, str]] = {
    "generation": "text-generation",
    "classification": "text-classification",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "seq2seq": "text2text-generation",
    "embeddings": "feature-extraction",
}
_FENCE: Final = "---\n"
_PICTURE: Final = re.compile(rf"{REPORT_FOLDER}/[A-Za-z0-9_.-]+\.(?:png|svg)")
_MAX_PICTURES: Final = 12


def write_card(staged: Path, manifest: Manifest, repo_id: str) -> bytes:
    """Return the card of the version whose files are in ``staged``."""
    own = staged / README_FILE
    old, body = _split(own.read_text(errors="replace")) if own.exists() else ({}, "")
    metadata = {**old, **_metadata(staged, manifest, old)}
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"{_FENCE}{front}{_FENCE}\n{body or _body(manifest, repo_id)}".encode()


def empty_card(name: str) -> bytes:
    """Return the card of an adapter whose versions are all deleted."""
    front = yaml.safe_dump({"library_name": "peft", "tags": [TAG, "lora"]}, sort_keys=False)
    return f"{_FENCE}{front}{_FENCE}\n# {name}\n\nAll versions were deleted.\n".encode()


def _metadata(staged: Path, manifest: Manifest, old: dict[str, Any]) -> dict[str, Any]:
    base = _base_id(staged, manifest)
    pipeline = _PIPELINES[manifest.task.kind]
    mine = [TAG, "lora", *([f"base_model:adapter:{base}"] if base else [])]
    theirs = old.get("tags")
    tags = [str(tag) for tag in theirs] if isinstance(theirs, list) else []
    found: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": pipeline,
        "tags": list(dict.fromkeys([*mine, *tags])),
    }
    if base:
        found |= {"base_model": base, "base_model_relation": "adapter"}
    licence = manifest.data.get("license")
    if isinstance(licence, str) and licence:
        found["license"] = licence
    source = manifest.data.get("source")
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        found["datasets"] = [source]
    if manifest.metrics is not None:
        found["model-index"] = [_index(manifest, pipeline)]
    return found


def _base_id(staged: Path, manifest: Manifest) -> str:
    """Return the base's id on the Hub; empty when only a folder or a short name is known."""
    config = json.loads((staged / CONFIG_FILE).read_bytes())
    names = (config.get("base_model_name_or_path"), manifest.base.name)
    return next((str(n) for n in names if isinstance(n, str) and _HUB_ID.fullmatch(n)), "")


def _index(manifest: Manifest, pipeline: str) -> dict[str, Any]:
    assert manifest.metrics is not None
    source = manifest.data.get("source")
    name = source if isinstance(source, str) and source else "held-out examples"
    return {
        "name": manifest.name,
        "results": [
            {
                "task": {"type": pipeline},
                "dataset": {"name": name, "type": name, "split": "test"},
                "metrics": [
                    {"type": kind, "name": kind, "value": value}
                    for kind, value in sorted(manifest.metrics.adapter.items())
                ],
            }
        ],
    }


def _body(manifest: Manifest, repo_id: str) -> str:
    lines = [f"# {manifest.name}", ""]
    if manifest.description:
        lines += [manifest.description, ""]
    lines += [
        f"A LoRA adapter of rank {manifest.method.rank} for base `{manifest.base.name}`; version "
        f"{manifest.version}, `{manifest.digest}`.",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base, "{repo_id}", revision="v{manifest.version}")',
        "```",
        "",
    ]
    if manifest.metrics is not None:
        lines += [*_table(manifest.metrics), ""]
    return "\n".join([*lines, *_report(manifest)]).rstrip() + "\n"


def _table(metrics: Metrics) -> list[str]:
    """Return the figures, with the interval of what the adapter gains where there is one."""
    has_gains = any(one.difference is not None for one in metrics.uncertainty.values())
    head = ["metric", "base", "adapter"]
    head += [f"difference, {metrics.confidence:.0%} interval"] if has_gains else []
    lines = [
        f"On {metrics.num_examples} held-out examples:",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
    ]
    for kind, value in sorted(metrics.adapter.items()):
        name = f"{kind} (lower is better)" if is_lower_better(kind) else kind
        cells = [name, str(metrics.base.get(kind, "")), str(value)]
        sure = metrics.uncertainty.get(kind)
        if has_gains:
            found = sure.difference if sure else None
            cells.append(f"{found.low:+.4g} to {found.high:+.4g}" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _report(manifest: Manifest) -> list[str]:
    """Return the pictures of the version's report, and a link to its page."""
    paths = [entry.path for entry in manifest.files]
    pictures = [path for path in paths if _PICTURE.fullmatch(path)][:_MAX_PICTURES]
    lines = ["## Report", ""] if pictures or REPORT_PAGE in paths else []
    for path in pictures:
        caption = path.partition("/")[2].rpartition(".")[0].replace("_", " ")
        lines += [f"![{caption}]({path})", ""]
    if REPORT_PAGE in paths:
        lines += [
            f"All of it is in [`{REPORT_PAGE}`]({REPORT_PAGE}), one file: download and open it.",
            "",
        ]
    return lines


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Return metadata and text of a README; metadata that is no mapping counts as text."""
    if not text.startswith(_FENCE):
        return {}, text
    front, fence, body = text.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    if not fence:
        return {}, text
    try:
        found = yaml.safe_load(front)
    except yaml.YAMLError:
        return {}, text
    return (found, body.lstrip("\n")) if isinstance(found, dict) else ({}, text)
