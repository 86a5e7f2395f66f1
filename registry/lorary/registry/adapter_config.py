"""Read ``adapter_config.json`` strictly: what may be in it, and which modules, ranks and scales it means.

PEFT warns about unknown keys and goes on, and some keys change the *base* of every other adapter when
they are merely present. Here every key is either understood, or must be switched off (null, false,
empty); a key nobody has heard of must be switched off, too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from lorary.errors import CorruptArtifact, IncompatibleAdapter
from lorary.registry.config_fields import (
    flag,
    invocation_tokens,
    layers,
    layers_pattern,
    modules,
    numbers,
    positive,
    shown,
    text,
    whole,
)
from lorary.registry.findings import Report, attempt, refuse
from lorary.registry.module_patterns import first_matches, is_plain, matching_names
from lorary.registry.strict_json import parse_json, show

T = TypeVar("T")

CAUSAL_LM: Final = "CAUSAL_LM"
MAX_SCALE: Final = 1024.0
"""Largest alpha / r (or alpha / sqrt(r)); real adapters stay below 100."""
MIN_SCALE: Final = 1e-6
"""Smallest one: below it nothing is left of B in half precision."""

_READ: Final = frozenset(
    {
        "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "layers_pattern",
        "layers_to_transform", "lora_alpha", "alpha_pattern", "peft_type", "r", "rank_pattern",
        "revision", "target_modules", "task_type", "use_dora", "use_rslora", "bias",
        "init_lora_weights",
    }
)  # fmt: skip
# They steer training, name a library, or belong to an option that must be off; when an adapter is
# applied they mean nothing.
_IGNORED: Final = frozenset(
    {"inference_mode", "lora_dropout", "peft_version", "megatron_core", "qalora_group_size"}
)
_WHY: Final = {
    "alora_invocation_tokens": "only what generates text is read after an invocation",
    "auto_mapping": "it names Python classes to import; save the adapter with a task_type",
    "layer_replication": "it changes the layers of the base for every adapter",
    "lora_bias": "biases on lora_B are not plain LoRA",
    "modules_to_save": "it replaces whole modules of the base; train the LoRA matrices alone",
    "target_parameters": "LoRA on bare parameters (fused experts) cannot be served",
    "trainable_token_indices": "it changes the token table of the base",
}
_NO_PLAIN_LORA: Final = (
    "adapter_config.json switches on 'use_dora': DoRA's magnitude vectors are no plain LoRA, which is all "
    "that fits here. Train with use_dora=False, or merge it into a model of its own: registry export NAME "
    "--to merged DIR"
)
_NO_ACTIVATED_DORA: Final = (
    "adapter_config.json switches on both 'use_dora' and 'alora_invocation_tokens': a DoRA that begins in "
    "the middle of a prompt is computed neither by PEFT nor here. Train with one of the two"
)
_PLAIN_INITS: Final = (True, False, None, "gaussian", "orthogonal")
# These subtract the adapter's start from the base: exact once converted to a difference.
_RESIDUAL_INITS: Final = ("pissa", "olora", "corda", "lora_ga")
_TO_CONVERT: Final = (
    "Convert it: model.save_pretrained(DIR, path_initial_model_for_weight_conversion=START), where "
    "START is the adapter as it was saved before training; or, if --base names the residual model that "
    "it was trained on, say so with --residual-base"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The understood part of an ``adapter_config.json``, types and ranges checked.

    ``invocation_tokens`` are aLoRA's (arXiv 2504.12397): the adapter is on from the first of them, where they
    stand last in the prompt; none for an adapter that is always on.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    use_dora: bool
    use_rslora: bool
    fan_in_fan_out: bool
    base_model_name_or_path: str | None
    revision: str | None
    task_type: str
    modules_to_save: tuple[str, ...]
    invocation_tokens: tuple[int, ...] = ()

    @property
    def is_canonical(self) -> bool:
        """Whether every scale is 1 and modules are named plainly, as in the form that is stored."""
        plain = (*self.rank_pattern, *self.target_modules)
        return (
            self.alpha == self.rank
            and not self.use_rslora
            and self.rank_pattern == self.alpha_pattern
            and isinstance(self.target_modules, tuple)
            and not self.exclude_modules
            and self.layers_to_transform is None
            and all(is_plain(name) for name in plain)
        )

    def targets(self, names: Collection[str]) -> set[str]:
        """Return which of ``names`` PEFT would adapt.

        Raises:
            CorruptArtifact: a regular expression does not compile or takes too long.
        """
        excluded = _select(self.exclude_modules, names)
        chosen = _select(self.target_modules, names) - excluded
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return chosen
        exact = set(self.target_modules)
        return {name for name in chosen if name in exact or self._is_in_layers(name)}

    def ranks(self, names: Collection[str]) -> dict[str, int]:
        """Return the rank of every module of ``names``, by ``rank_pattern`` and ``r``."""
        matches = first_matches(tuple(self.rank_pattern), names)
        return {n: self.rank_pattern[matches[n]] if n in matches else self.rank for n in names}

    def scales(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return the factor on B·A of every module, by ``alpha_pattern``, ``lora_alpha``, rsLoRA.

        Semantics: ``scale = alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.

        Raises:
            IncompatibleAdapter: a scale is above ``MAX_SCALE`` or below ``MIN_SCALE``.
        """
        matches = first_matches(tuple(self.alpha_pattern), ranks)
        scales: dict[str, float] = {}
        for name, rank in ranks.items():
            alpha = self.alpha_pattern[matches[name]] if name in matches else self.alpha
            scales[name] = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            if scales[name] > MAX_SCALE:
                raise IncompatibleAdapter(
                    f"module {name} has alpha {alpha:g} at rank {rank}: a scale of "
                    f"{scales[name]:g}; the limit is {MAX_SCALE:g}. It would drown the base."
                )
            if scales[name] < MIN_SCALE:
                raise IncompatibleAdapter(
                    f"module {name} has alpha {alpha:g} at rank {rank}: with a scale of "
                    f"{scales[name]:g} the adapter has no effect; the limit is {MIN_SCALE:g}"
                )
        return scales

    def _is_in_layers(self, name: str) -> bool:
        """PEFT's rule: the first number after a dotted name (or after one of ``layers_pattern``)."""
        patterns = [rf"(?:^|.*?\.){re.escape(p)}\.(\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, name):
                return int(match[1]) in (self.layers_to_transform or ())
        return False


def parse_config(
    raw: bytes,
    *,
    max_rank: int,
    allow_dora: bool = False,
    residual_base: bool = False,
    task_type: str = CAUSAL_LM,
) -> AdapterConfig:
    """Parse and check the bytes of an ``adapter_config.json``; see ``examine_config``.

    Raises:
        CorruptArtifact: not JSON, a missing key, or a value of the wrong type.
        IncompatibleAdapter: a kind of adapter, an option or a size that is not served.
    """
    found = examine_config(
        raw,
        refuse,
        max_rank=max_rank,
        allow_dora=allow_dora,
        residual_base=residual_base,
        task_type=task_type,
    )
    return cast("AdapterConfig", found)  # `refuse` raises where there would be none


def examine_config(
    raw: bytes,
    report: Report,
    *,
    max_rank: int,
    allow_dora: bool = False,
    residual_base: bool = False,
    task_type: str = CAUSAL_LM,
) -> AdapterConfig | None:
    """Parse an ``adapter_config.json`` and report everything that is wrong with it.

    Args:
        raw: the file's bytes.
        report: told of every problem.
        max_rank: largest rank of any module.
        allow_dora: accept ``use_dora``, for a use that knows what to do with magnitude vectors.
        residual_base: the base is the one that PiSSA and its kin left behind, so that the adapter is
            right as it is.
        task_type: the one that the adapter must have; heads are accepted beside any but ``CAUSAL_LM``.

    Returns:
        The configuration; ``None`` if something was reported without which it cannot be understood.
    """
    parsed = attempt(report, lambda: parse_json(raw, "adapter_config.json"))
    if parsed is None:
        return None
    config = parsed
    _check_switched_off(
        config, report, allow_dora=allow_dora, residual_base=residual_base, task_type=task_type
    )
    is_whole = True

    def field(read: Callable[[], T]) -> T:
        nonlocal is_whole
        try:
            return read()
        except (CorruptArtifact, IncompatibleAdapter) as problem:
            report(problem)
            is_whole = False
            return cast("T", None)  # never seen: without the field there is no configuration

    found = AdapterConfig(
        rank=field(lambda: _rank("r", whole(config, "r"), max_rank)),
        alpha=field(lambda: positive("lora_alpha", config.get("lora_alpha"))),
        rank_pattern=field(lambda: _rank_pattern(config, max_rank)),
        alpha_pattern=field(lambda: numbers(config, "alpha_pattern", whole=False)),
        target_modules=field(lambda: modules(config, "target_modules", is_needed=True)),
        exclude_modules=field(lambda: modules(config, "exclude_modules", is_needed=False)),
        layers_to_transform=field(lambda: layers(config)),
        layers_pattern=field(lambda: layers_pattern(config)),
        use_dora=field(lambda: flag(config, "use_dora")),
        use_rslora=field(lambda: flag(config, "use_rslora")),
        fan_in_fan_out=field(lambda: flag(config, "fan_in_fan_out")),
        base_model_name_or_path=field(lambda: text(config, "base_model_name_or_path")),
        revision=field(lambda: text(config, "revision")),
        task_type=task_type,
        modules_to_save=field(lambda: _heads(config)),
        invocation_tokens=field(lambda: invocation_tokens(config)),
    )
    return found if is_whole else None


def _rank(where: str, value: int, max_rank: int) -> int:
    if not 1 <= value <= max_rank:
        raise IncompatibleAdapter(
            f"adapter_config.json has rank {shown(value)} for {show(where)}; "
            f"1 to {max_rank} are accepted"
        )
    return value


def _rank_pattern(config: Mapping[str, Any], max_rank: int) -> dict[str, int]:
    pattern = numbers(config, "rank_pattern", whole=True)
    return {key: _rank(key, int(value), max_rank) for key, value in pattern.items()}


def _check_switched_off(
    config: Mapping[str, Any],
    report: Report,
    *,
    allow_dora: bool,
    residual_base: bool,
    task_type: str,
) -> None:
    peft_type, own_type = config.get("peft_type"), config.get("task_type")
    if peft_type != "LORA":
        report(
            IncompatibleAdapter(
                f"adapter_config.json has peft_type {shown(peft_type)}; only 'LORA' is served. "
                "Convert the adapter to LoRA."
            )
        )
    if own_type != task_type and (own_type is not None or task_type != CAUSAL_LM):
        only = (
            "only 'CAUSAL_LM' is served"
            if task_type == CAUSAL_LM
            else f"the task needs {task_type}"
        )
        report(IncompatibleAdapter(f"adapter_config.json has task_type {shown(own_type)}; {only}"))
    if config.get("bias", "none") != "none":
        report(
            IncompatibleAdapter(
                f"adapter_config.json has bias {shown(config['bias'])}: trained biases replace those "
                "of the base; only 'none' is served"
            )
        )
    if config.get("use_dora") is True and not allow_dora:
        report(IncompatibleAdapter(_NO_PLAIN_LORA))
    if config.get("use_dora") is True and config.get("alora_invocation_tokens"):
        report(IncompatibleAdapter(_NO_ACTIVATED_DORA))
    problem = _init_problem(config.get("init_lora_weights", True), residual_base=residual_base)
    if problem:
        report(IncompatibleAdapter(problem))
    own = {"alora_invocation_tokens"} if task_type == CAUSAL_LM else {"modules_to_save"}
    read = _READ | own
    for key, value in config.items():
        if key not in read and key not in _IGNORED and value not in (None, False, [], {}):
            known = _WHY.get(key, "it may change what the adapter computes")
            if key.startswith("megatron"):
                known = "it hands the base's layers to Megatron; save the adapter without it"
            report(
                IncompatibleAdapter(
                    f"adapter_config.json switches on {show(key)} ({shown(value)}), which is not "
                    f"served: {known}"
                )
            )


def _heads(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return ``modules_to_save``; whether they are heads, their tensors tell."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and is_plain(n) for n in names):
        raise CorruptArtifact(
            f"adapter_config.json has modules_to_save {shown(names)}; a list of module names is needed"
        )
    return tuple(sorted(set(names)))


def _init_problem(init: Any, *, residual_base: bool) -> str:
    """Return why an ``init_lora_weights`` is refused, empty if it is not."""
    if any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
        return ""
    problem = f"adapter_config.json has init_lora_weights {shown(init)}, which changes the base. "
    if isinstance(init, str) and init.startswith(_RESIDUAL_INITS):
        return "" if residual_base else problem + _TO_CONVERT
    if init == "loftq":
        return problem + (
            "LoftQ trains on a base that it quantized in its own way: push with that base as --base "
            "and init_lora_weights true, or merge the adapter"
        )
    if init == "eva":
        return problem + (
            "EVA only chooses where A starts and may be given as trained: save it with "
            "init_lora_weights true and the rank_pattern that EVA chose"
        )
    return problem + "Save the adapter with init_lora_weights true once its values are final"


def _select(pattern: str | tuple[str, ...], names: Collection[str]) -> set[str]:
    if isinstance(pattern, str):
        return set(names) if pattern == "all-linear" else matching_names(pattern, names)
    wanted = set(pattern)
    return {name for name in names if not wanted.isdisjoint(_suffixes(name))}


# The names are the base's own, and every adapter is compared with all.
@functools.lru_cache(maxsize=1 << 14)
def _suffixes(name: str) -> frozenset[str]:
    parts = name.split(".")
    return frozenset(".".join(parts[i:]) for i in range(len(parts)))
