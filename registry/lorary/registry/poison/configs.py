"""Configurations and manifests that lie, overflow, run code, or change the base by being present."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from lorary.errors import IncompatibleAdapter, LoraryError
from lorary.registry.poison.attack import Attack, Victim, corrupt, misfit

_BOMB: Final = r"(.*)*(.*)*(.*)*(.*)*!"


def _set(**changes: Any) -> Callable[[Victim], None]:
    return lambda victim: victim.set_config(**changes)


def _raw(content: bytes) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        victim.config.write_bytes(content)

    return change


def _twice(victim: Victim) -> None:
    victim.config.write_text(victim.config.read_text()[:-1] + ', "r": 4}')


def _manifest(**changes: Any) -> Callable[[Victim], None]:
    """Change parts of the manifest; a dict is merged into the part."""

    def change(victim: Victim) -> None:
        raw = json.loads(victim.manifest.read_text())
        for key, value in changes.items():
            raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
        victim.manifest.write_text(json.dumps(raw))

    return change


def _raw_manifest(content: bytes) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        victim.manifest.write_bytes(content)

    return change


def _wrong(name: str, what: str, says: str, **changes: Any) -> Attack:
    return corrupt("config", name, what, says, _set(**changes))


def _off(name: str, what: str, says: str, **changes: Any) -> Attack:
    return misfit("config", name, what, says, _set(**changes))


def _based(
    name: str,
    what: str,
    says: str,
    change: Callable[[Victim], None],
    error: type[LoraryError] = IncompatibleAdapter,
) -> Attack:
    return Attack(name=name, kind="base", what=what, says=says, change=change, error=error)


_FOREIGN: Final = "sha256:" + "0" * 64
_CONVERT: Final = "changes the base"

ATTACKS: Final[tuple[Attack, ...]] = (
    corrupt("config", "config-of-no-bytes", "An empty configuration.", "not JSON", _raw(b"")),
    corrupt("config", "config-is-a-list", "A configuration that is a list.", "must be an object", _raw(b"[]")),
    corrupt("config", "config-is-not-utf8", "Bytes that are no text.", "not JSON", _raw(b'{"r": "\xff"}')),
    corrupt("config", "config-nested-deeply", "A million brackets.", "not JSON", _raw(b'{"r":' + b"[" * 1_000_000)),
    corrupt("config", "config-with-a-key-twice", "Two ranks, for two parsers.", "twice", _twice),
    corrupt("config", "config-with-nan", "NaN as a number.", "not JSON", _raw(b'{"peft_type": "LORA", "r": NaN}')),
    _off("rank-0", "A rank of 0, which divides.", "rank 0", r=0),
    _off("rank-negative", "A negative rank.", "rank -4", r=-4),
    _off("rank-of-400-digits", "A rank that no memory holds.", "1 to 512", r=10**400),
    _off("rank-in-a-pattern", "A rank over the limit, in rank_pattern.", "1 to 512", rank_pattern={"x": 4096}),
    _wrong("rank-fractional", "A rank that is no whole number.", "whole number", r=4.5),
    _wrong("rank-true", "A truth value as a rank.", "whole number", r=True),
    _wrong("rank-as-text", "A rank in quotes.", "whole number", r="4"),
    _off("alpha-1e12", "A scale that drowns the base.", "drown", lora_alpha=1e12),
    _off("alpha-1e30", "A scale that overflows half precision.", "drown", lora_alpha=1e30),
    _off("alpha-in-a-pattern", "The same, hidden in alpha_pattern.", "drown", alpha_pattern={r".*": 1e30}),
    _off("alpha-of-400-digits", "A whole number that no float holds.", "drown", lora_alpha=10**400),
    _wrong("alpha-0", "A scale of 0.", "positive", lora_alpha=0),
    _wrong("alpha-negative", "A scale below 0.", "positive", lora_alpha=-8),
    _wrong("alpha-as-text", "A scale in quotes.", "positive", lora_alpha="8"),
    _off("alpha-that-vanishes", "A scale so small that the change is 0.", "no effect", lora_alpha=1e-300),
    _off("init-pissa", "PEFT repeats the decomposition at load and subtracts it from the resident base.",
         _CONVERT, init_lora_weights="pissa"),
    _off("init-pissa-niter", "The same, with the fast decomposition.", _CONVERT, init_lora_weights="pissa_niter_16"),
    _off("init-olora", "PEFT repeats the decomposition at load and subtracts it from the resident base.",
         _CONVERT, init_lora_weights="olora"),
    _off("init-corda", "The same, by CorDA.", _CONVERT, init_lora_weights="corda"),
    _off("init-eva", "An initialisation that needs data.", _CONVERT, init_lora_weights="eva"),
    _off("init-loftq", "An initialisation that quantizes the base anew.", _CONVERT, init_lora_weights="loftq"),
    _off("init-unknown", "An initialisation nobody knows.", _CONVERT, init_lora_weights="magic"),
    _off("layer-replication", "PEFT rebuilds the resident base with more layers.",
         "layers of the base", layer_replication=[[0, 2], [0, 2]]),
    _off("auto-mapping", "Names of Python modules and classes to import.", "classes to import",
         auto_mapping={"base_model_class": "system", "parent_library": "os"}),
    _off("auto-map", "Names of Python files to run.", "auto_map", auto_map={"AutoModel": "evil.Model"}),
    _off("megatron-config", "Hands the base's layers to another library.", "Megatron",
         megatron_config={"tensor_model_parallel_size": 2}),
    _off("modules-to-save", "Whole modules of the base, replaced.", "whole modules", modules_to_save=["lm_head"]),
    _off("target-parameters", "Bare parameters of fused experts.", "bare parameters", target_parameters=["w1"]),
    _off("token-indices", "Rows of the shared token table.", "token table", trainable_token_indices=[1, 2]),
    _off("bias-all", "Biases of the base, replaced.", "biases replace", bias="all"),
    _off("lora-bias", "Biases that plain LoRA has not.", "plain LoRA", lora_bias=True),
    _off("arrow", "Routing between adapters.", "arrow_config", arrow_config={"router_temperature": 1.0}),
    _off("unknown-option", "A key that somebody will understand one day.", "run_on_load", run_on_load="rm"),
    _off("unknown-method", "A method that does not exist.", "peft_type", peft_type="EVIL"),
    _off("method-as-a-list", "A method that is no text.", "peft_type", peft_type=["LORA"]),
    _off("classifier", "A task that brings a head of its own.", "CAUSAL_LM", task_type="SEQ_CLS"),
    _wrong("dora-without-magnitudes", "use_dora over plain LoRA: loaders make up the magnitudes.",
           "magnitude", use_dora=True),
    _wrong("regex-bomb", "A pattern that takes years to match.", "takes longer", target_modules=_BOMB),
    _wrong("regex-bomb-in-excludes", "The same, in exclude_modules.", "takes longer", exclude_modules=_BOMB),
    _wrong("regex-bomb-in-ranks", "The same, in rank_pattern.", "takes longer", rank_pattern={_BOMB: 4}),
    _wrong("regex-bomb-in-alphas", "The same, in alpha_pattern.", "takes longer", alpha_pattern={_BOMB: 8}),
    _wrong("regex-that-is-none", "A pattern that does not compile.", "regular expression", target_modules="("),
    _wrong("thousands-of-patterns", "Patterns that are cheap alone.", "patterns",
           rank_pattern={f"(a{i})*": 4 for i in range(2000)}),
    _wrong("no-modules", "A configuration that targets nothing.", "list of module names", target_modules=[]),
    _wrong("modules-are-numbers", "Module names that are numbers.", "list of module names", target_modules=[1, 2]),
    _wrong("modules-of-another-model", "Names that the base does not have.", "does not target",
           target_modules=["query_key_value"]),
    _off("head-as-a-target", "The output head among the targets.", "output head",
         target_modules=["lm_head", "q_proj", "k_proj", "v_proj"]),
    _wrong("a-million-layers", "A list of layers that takes long to search.", "layers_to_transform",
           layers_to_transform=[*range(200_000)]),
    _wrong("pattern-of-layers", "A pattern where a name is expected.", "layers_pattern", layers_pattern="(a+)+"),
    _wrong("newline-in-the-base-name", "A name that forges a line of a log.", "text is needed",
           base_model_name_or_path="x\nINFO all is well"),
    _wrong("base-name-of-5000-characters", "A name that fills logs.", "text is needed",
           base_model_name_or_path="a" * 5000),
    _based("another-base", "Right shapes and the right name, trained on other weights.", "trained on base",
           _manifest(base={"fingerprint": _FOREIGN})),
    _based("another-base-by-name", "Another base of the same shapes.", "trained on base",
           _manifest(base={"name": "somebody/else", "fingerprint": _FOREIGN})),
    _based("fingerprint-that-is-none", "A fingerprint of no digits.", "trained on base",
           _manifest(base={"fingerprint": ""})),
    corrupt("base", "manifest-of-no-bytes", "An empty manifest.", "manifest", _raw_manifest(b"")),
    corrupt("base", "manifest-of-the-future", "A format that this Lorary does not read.", "format_version",
            _manifest(format_version=99)),
    corrupt("base", "manifest-with-an-unknown-key", "A key nobody knows.", "unknown key", _manifest(run_on_load="rm")),
    corrupt("base", "manifest-that-climbs", "A file outside of the folder.", "cannot be one",
            _manifest(files=[{"path": "../../x", "size": 1, "sha256": "0" * 64}])),
    corrupt("base", "manifest-with-an-absolute-path", "A file of the machine.", "cannot be one",
            _manifest(files=[{"path": "/etc/passwd", "size": 1, "sha256": "0" * 64}])),
    corrupt("base", "manifest-of-wrong-types", "Text where a number is expected.", "must be",
            _manifest(method={"rank": "4"})),
)  # fmt: skip
