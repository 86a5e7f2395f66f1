"""The commands of the transcript, what they run on, and how two transcripts are compared."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from benchmarks.harness.machine import ROOT
from benchmarks.report import markers, write_section

NAME: Final = "transcript"
DOCUMENT: Final = ROOT / "docs" / "registry.md"
COMMANDS: Final = (
    ("registry push runs/monday sentiment --alias prod", 0),
    ("registry push runs/tuesday sentiment --alias canary", 0),
    ('registry promote sentiment@canary prod --reason "accuracy +0.05"', 0),
    ("registry push runs/wednesday sentiment --alias canary", 5),
    ('registry rollback sentiment prod --reason "German reviews are all negative"', 0),
    ("registry log sentiment --alias prod", 0),
    ("registry fsck", 0),
)
"""What is typed, and the exit code it must end with."""
_MODULE: Final = "model.layers.0.self_attn.q_proj"
_WIDTH: Final = 64
_CHANGING: Final = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "TIME"),
    (re.compile(r"sha256:[0-9a-f]+"), "DIGEST"),
    (re.compile(r"[0-9.]+ (?:B|kB|MB)\b"), "SIZE"),
    (re.compile(r"[ ─━]+"), " "),
)


def main(
    check: Annotated[bool, typer.Option("--check", help="Compare, and write nothing.")] = False,
) -> None:
    """Record the transcript."""
    text = transcript()
    if not check:
        write_section(DOCUMENT, NAME, text)
        typer.echo(f"{DOCUMENT} shows {len(COMMANDS)} commands", err=True)
    elif comparable(text) != comparable(recorded()):
        typer.echo(f"{DOCUMENT} shows something else; run scripts/transcript.py", err=True)
        typer.echo(text, err=True)
        raise typer.Exit(1)


def recorded() -> str:
    """Return the transcript that stands in the docs."""
    begin, end = markers(NAME)
    return DOCUMENT.read_text().partition(begin)[2].partition(end)[0].strip()


def comparable(text: str) -> str:
    """Return a transcript without what differs from run to run."""
    for pattern, word in _CHANGING:
        text = pattern.sub(word, text)
    return text


def transcript() -> str:
    """Run the commands in a fresh registry and return what a terminal shows, as Markdown.

    Raises:
        RuntimeError: one ended with another exit code than it must.
    """
    lines = ["```console"]
    with tempfile.TemporaryDirectory(prefix="lorary-transcript-") as scratch:
        work = Path(scratch)
        make_runs(work)
        environment = {
            **os.environ,
            "LORARY_REGISTRY": "registry",
            "LOGNAME": "ada",
            "NO_COLOR": "1",
            "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path),
        }
        for command, code in COMMANDS:
            _, *words = shlex.split(command)
            done = subprocess.run(
                [sys.executable, "-m", "lorary.registry", *words],
                cwd=work,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode != code:
                raise RuntimeError(
                    f"`{command}` ended with {done.returncode}, not {code}:\n{done.stdout}"
                )
            lines += [f"$ {command}", *(line.rstrip() for line in done.stdout.splitlines())]
            if code:
                lines += ["$ echo $?", str(code)]
    return "\n".join([*lines, "```"])


def make_runs(work: Path) -> None:
    """Write a tiny base and three runs: two that are right, and one that diverged."""
    import numpy as np

    from lorary.registry.base import BaseCard

    base = work / "models" / "tiny"
    base.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": _WIDTH,
        "num_hidden_layers": 1,
        "vocab_size": 256,
    }
    (base / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((_WIDTH, _WIDTH), dtype=np.float32)
    _write(base / "model.safetensors", {f"{_MODULE}.weight": weight})
    card = BaseCard.from_folder(base)
    for day, accuracy in (("monday", 0.86), ("tuesday", 0.91), ("wednesday", 0.93)):
        a = generator.standard_normal((8, _WIDTH), dtype=np.float32) * np.float32(0.01)
        b = generator.standard_normal((_WIDTH, 8), dtype=np.float32) * np.float32(0.01)
        if day == "wednesday":
            b[3, 1] = np.nan
        _write_run(work / "runs" / day, card, a, b, accuracy)


def _write_run(folder: Path, card: Any, a: Any, b: Any, accuracy: float) -> None:
    from lorary.registry.manifest import BaseIdentity, Manifest, Method, Metrics, Task

    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "models/tiny",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{_MODULE}"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    _write(folder / "adapter_model.safetensors", tensors)
    manifest = Manifest(
        base=BaseIdentity(
            name="models/tiny", fingerprint=card.fingerprint, architecture=card.architecture
        ),
        method=Method(name="lora", rank=8, alpha=16.0, target_modules=("q_proj",)),
        task=Task(kind="classification", labels=("negative", "positive")),
        metrics=Metrics(
            primary="accuracy",
            num_examples=200,
            base={"accuracy": 0.5},
            adapter={"accuracy": accuracy},
        ),
    )
    (folder / "manifest.json").write_text(manifest.to_json())


def _write(file: Path, tensors: dict[str, Any]) -> None:
    from lorary.registry.safetensors_file import write

    layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with file.open("wb") as opened:
        write(opened, layout, tensors.__getitem__, {"format": "pt"})
