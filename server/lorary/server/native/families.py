"""What transformers' decoders are in the words of layer.cpp: which norms and where, rotary embedding, scalars.

A family says by attribute paths where its modules keep what the native form reads; a layer of a family
that is not here, or whose settings layer.cpp has no word for, is left to transformers' own code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorary.server.adapters.layers import LoraGroup

# Numbers of layer.cpp's Activation, by transformers' names.
_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_python_tanh": 1,
    "gelu_new": 1,
    "gelu_fast": 1,
    "relu": 2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where models of one family keep what layer.cpp reads: paths from the layer, "" for what they lack.

    The defaults are Llama's.

    Attributes:
        last_norm, positions: from the decoder; ``positions`` is a table of learned positions.
        qkv, o, up, down: the first linear layer of each projection.
        attention_norm, mlp_norm: of what enters attention and MLP.
        attention_after, mlp_after: of what comes out of them, before it joins the residual stream.
        q_norm, k_norm: of queries and keys; modules may lack them.
        norm_offset: what norms add to their weight.
        is_gated: whether the MLP has a gate.
        is_parallel: whether the MLP reads what attention reads.
        activation: setting of the config that names the MLP's function.
        window: how many positions a layer sees; None or 0 there is all.
        has_rope: whether a layer has rotary positions, where that differs between layers.
        softcap: setting of the config that bounds attention's scores.
        residual: setting of the config that scales what joins the residual stream.
        embedding_scale: from the decoder.
        is_interleaved: whether a rotary embedding's pairs are neighbours.
        logits_factor, logits_divisor, logits_softcap: settings of the config, in the order of their use.
        needed: settings of the config without which the layers are others than layer.cpp's.
    """

    last_norm: str = "norm"
    positions: str = ""
    attention: str = "self_attn"
    qkv: str = "self_attn.q_proj"
    o: str = "self_attn.o_proj"
    up: str = "mlp.gate_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    attention_after: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_after: str = ""
    q_norm: str = ""
    k_norm: str = ""
    norm_offset: float = 0.0
    is_gated: bool = True
    is_parallel: bool = False
    activation: str = "hidden_act"
    window: str = ""
    has_rope: str = ""
    softcap: str = ""
    residual: str = ""
    embedding_scale: str = ""
    is_interleaved: bool = False
    logits_factor: str = ""
    logits_divisor: str = ""
    logits_softcap: str = ""
    needed: Mapping[str, object] = field(default_factory=dict)


_HEAD_NORMS: dict[str, Any] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "embedding_scale": "embed_tokens.embed_scale"}
_GEMMA_2_AND_3: dict[str, Any] = {
    **_GEMMA,
    "attention_after": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_after": "post_feedforward_layernorm",
    "activation": "hidden_activation",
    "window": "self_attn.sliding_window",
    "logits_softcap": "final_logit_softcapping",
}
_OLMO: dict[str, Any] = {
    **_HEAD_NORMS,
    "attention_norm": "",
    "attention_after": "post_attention_layernorm",
    "mlp_norm": "",
    "mlp_after": "post_feedforward_layernorm",
}
_COHERE: dict[str, Any] = {
    "mlp_norm": "",
    "is_parallel": True,
    "is_interleaved": True,
    "logits_factor": "logit_scale",
}

# By the class of the layers. Whoever adds one adds its line in tests/server/test_families.py.
FAMILIES: Mapping[str, Family] = {
    "LlamaDecoderLayer": Family(),
    "MistralDecoderLayer": Family(window="self_attn.config.sliding_window"),
    "Qwen2DecoderLayer": Family(window="self_attn.sliding_window"),
    "Qwen3DecoderLayer": Family(window="self_attn.sliding_window", **_HEAD_NORMS),
    "GemmaDecoderLayer": Family(**_GEMMA),
    "Gemma2DecoderLayer": Family(**_GEMMA_2_AND_3, softcap="attn_logit_softcapping"),
    # Has that setting, too, and does not read it.
    "Gemma3DecoderLayer": Family(**_GEMMA_2_AND_3, **_HEAD_NORMS),
    "Phi3DecoderLayer": Family(
        qkv="self_attn.qkv_proj",
        up="mlp.gate_up_proj",
        window="self_attn.config.sliding_window",
    ),
    "PhiDecoderLayer": Family(
        last_norm="final_layernorm",
        o="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
        mlp_norm="",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        is_gated=False,
        is_parallel=True,
    ),
    "GPT2Block": Family(
        last_norm="ln_f",
        positions="wpe",
        attention="attn",
        qkv="attn.c_attn",
        o="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        is_gated=False,
        activation="activation_function",
    ),
    "OPTDecoderLayer": Family(
        last_norm="final_layer_norm",
        positions="embed_positions",
        o="self_attn.out_proj",
        up="fc1",
        down="fc2",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        is_gated=False,
        activation="activation_function",
        # Of OPT-350m, whose norms stand behind the sums.
        needed={"do_layer_norm_before": True},
    ),
    "GraniteDecoderLayer": Family(
        residual="residual_multiplier",
        embedding_scale="embedding_multiplier",
        logits_divisor="logits_scaling",
    ),
    "Olmo2DecoderLayer": Family(**_OLMO),
    "Olmo3DecoderLayer": Family(**_OLMO, window="self_attn.sliding_window"),
    # With norms of queries and keys every head has weights of its own.
    "CohereDecoderLayer": Family(**_COHERE, needed={"use_qk_norm": False}),
    "Cohere2DecoderLayer": Family(
        **_COHERE, window="self_attn.sliding_window", has_rope="self_attn.sliding_window"
    ),
    "Starcoder2DecoderLayer": Family(
        up="mlp.c_fc",
        down="mlp.c_proj",
        is_gated=False,
        window="self_attn.config.sliding_window",
    ),
    "SmolLM3DecoderLayer": Family(window="self_attn.sliding_window", has_rope="self_attn.use_rope"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMSNorm or, ``is_centred``, LayerNorm; weight and bias float32 [n], offsets included."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    is_centred: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """One layer in the words of layer.cpp, where each is explained.

    Attributes:
        groups: of the projections qkv, o, up and down.
        rope: which of the model's rotary tables, by the name that its rotary module has for them, "" when
            there is one for all layers; None for none.
        window: 0 for all positions.
        softcap: 0 for none.
    """

    index: int
    groups: tuple[LoraGroup, ...]
    attention_norm: Norm | None
    attention_after: Norm | None
    mlp_norm: Norm | None
    mlp_after: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    activation: int
    is_parallel: bool
    window: int
    rope: str | None
    scale: float
    softcap: float
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForm:
    """A whole decoder in the words of layer.cpp, and what becomes of the head's product.

    Attributes:
        embeddings: [vocab, hidden], in the model's dtype.
        positions: [positions, hidden] likewise, added to the embeddings; None for none.
        rotary: transformers' module that makes the tables, or None.
        logits_softcap: c of c * tanh(logits / c), 0 for none; after ``logits_factor``.
    """

    layers: tuple[LayerForm, ...]
    num_heads: int
    embeddings: torch.Tensor
    embedding_scale: float
    positions: torch.Tensor | None
    norm: Norm | None
    rotary: Any
    is_interleaved: bool
    head: Any
    logits_factor: float
    logits_softcap: float


class _NotNativeError(Exception):
    """Why layer.cpp is not the forward of a model."""


def read_model(
    model: Any, groups: Sequence[LoraGroup], dtype: torch.dtype, families: Mapping[str, Family]
) -> ModelForm | str:
    """Read a transformers model whose linear layers are ``groups`` and multiply in ``dtype``.

    Returns:
        What it is to layer.cpp; or the reason why it is nothing to it: layers of none of ``families``,
        a setting without a native form, a projection that is not packed (a quantized base).
    """
    try:
        return _read(model, groups, dtype, families)
    except _NotNativeError as reason:
        return str(reason)


def _read(
    model: Any, groups: Sequence[LoraGroup], dtype: torch.dtype, families: Mapping[str, Family]
) -> ModelForm:
    decoder = _decoder(model)
    layers = decoder_layers(model)
    if not layers:
        raise _NotNativeError(f"{type(decoder).__name__} keeps its layers elsewhere")
    by_module = {name: group for group in groups for name in group.spec.modules}
    names = {id(module): name for name, module in model.named_modules()}
    kinds = {type(layer).__name__ for layer in layers}
    if len(kinds) > 1:
        raise _NotNativeError(f"its layers are of several kinds: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind not in families:
        raise _NotNativeError(f"there is no native form of {kind}")
    family = families[kind]
    config = attrgetter(family.attention)(layers[0]).config
    for name, value in family.needed.items():
        if getattr(config, name) != value:
            raise _NotNativeError(
                f"{kind} with {name} = {getattr(config, name)!r} has no native form"
            )
    embeddings = model.get_input_embeddings().weight.data
    forms = tuple(
        _layer(layer, names[id(layer)], family, by_module, dtype, decoder) for layer in layers
    )
    widths = {
        tuple((g.spec.in_features, sum(g.spec.out_features)) for g in f.groups) for f in forms
    }
    if len(widths) > 1:
        raise _NotNativeError("its layers differ in width")
    width = forms[0].groups[0].spec.in_features
    if embeddings.shape[1] != width:
        raise _NotNativeError(f"embeddings of width {embeddings.shape[1]} enter layers of {width}")
    return ModelForm(
        layers=forms,
        num_heads=int(config.num_attention_heads),
        embeddings=embeddings,
        embedding_scale=_embedding_scale(decoder, family, embeddings.dtype),
        positions=_positions(decoder, family),
        norm=_norm(decoder, family.last_norm, family),
        rotary=getattr(decoder, "rotary_emb", None),
        is_interleaved=family.is_interleaved,
        head=model.get_output_embeddings(),
        logits_factor=_setting(config, family.logits_factor, 1.0)
        / _setting(config, family.logits_divisor, 1.0),
        logits_softcap=_setting(config, family.logits_softcap, 0.0),
    )


def decoder_layers(model: Any) -> tuple[Any, ...]:
    """Return a transformers model's decoder layers, the first one first; none where it keeps them elsewhere."""
    decoder = _decoder(model)
    found = (getattr(decoder, name, None) for name in ("layers", "h"))
    return tuple(next((some for some in found if isinstance(some, torch.nn.ModuleList)), ()))


def _decoder(model: Any) -> Any:
    """Return the module that has the layers."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), None)
    return getattr(inner, "decoder", inner)


def _layer(
    layer: Any,
    name: str,
    family: Family,
    groups: Mapping[str, LoraGroup],
    dtype: torch.dtype,
    decoder: Any,
) -> LayerForm:
    attention = attrgetter(family.attention)(layer)
    config = attention.config
    activation = getattr(config, family.activation)
    if activation not in _ACTIVATIONS:
        raise _NotNativeError(f"the activation '{activation}' has no native form")
    if not getattr(attention, "is_causal", True):
        raise _NotNativeError("its attention looks ahead")
    q_norm, k_norm = (_norm(layer, path, family) for path in (family.q_norm, family.k_norm))
    if (q_norm is None) != (k_norm is None):
        raise _NotNativeError("only one of queries and keys is normed")
    window = attrgetter(family.window)(layer) if family.window else None
    return LayerForm(
        index=int(attention.layer_idx),
        groups=_groups(name, family, groups, dtype),
        attention_norm=_norm(layer, family.attention_norm, family),
        attention_after=_norm(layer, family.attention_after, family),
        mlp_norm=_norm(layer, family.mlp_norm, family),
        mlp_after=_norm(layer, family.mlp_after, family),
        q_norm=q_norm,
        k_norm=k_norm,
        activation=_ACTIVATIONS[activation],
        is_parallel=family.is_parallel,
        window=int(window or 0),
        rope=_rope(layer, family, attention, decoder),
        scale=float(attention.scaling),
        softcap=_setting(config, family.softcap, 0.0),
        residual=_setting(config, family.residual, 1.0),
    )


def _groups(
    name: str, family: Family, groups: Mapping[str, LoraGroup], dtype: torch.dtype
) -> tuple[LoraGroup, ...]:
    found = []
    for path in (family.qkv, family.o, family.up, family.down):
        group = groups.get(f"{name}.{path}")
        if group is None or group.packed is None or group.packed.dtype not in (dtype, torch.int8):
            raise _NotNativeError(f"'{name}.{path}' is not packed for the native product")
        found.append(group)
    qkv, o, up, down = (sum(group.spec.out_features) for group in found)
    heads, inner = found[1].spec.in_features, found[3].spec.in_features
    # Layers that one projection should have together, and that do not read one input.
    if qkv <= heads or up != inner * (2 if family.is_gated else 1) or o != down:
        raise _NotNativeError(f"the projections of '{name}' are not those of its family")
    return tuple(found)


def _norm(module: Any, path: str, family: Family) -> Norm | None:
    """Read a norm; None when the module has none there."""
    *parents, last = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    norm = getattr(module, last, None) if path else None
    if norm is None:
        return None
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    bias = getattr(norm, "bias", None)
    # Without a weight of its own: OPT's may be so.
    weight = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight.data.float()
    return Norm(
        weight=(weight + family.norm_offset).contiguous(),
        bias=None if bias is None else bias.data.float().contiguous(),
        eps=float(eps),
        is_centred=type(norm).__name__.endswith("LayerNorm"),
    )


def _rope(layer: Any, family: Family, attention: Any, decoder: Any) -> str | None:
    """Return the name of a layer's rotary tables."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or (family.has_rope and not attrgetter(family.has_rope)(layer)):
        return None
    if not isinstance(rotary.rope_type, dict):
        return ""
    return str(attention.config.layer_types[attention.layer_idx])


def _positions(decoder: Any, family: Family) -> torch.Tensor | None:
    """Return a table of learned positions from position 0 on."""
    if not family.positions:
        return None
    table = attrgetter(family.positions)(decoder)
    # OPT's begins with rows that no position has.
    weight: torch.Tensor = table.weight.data[getattr(table, "offset", 0) :]
    return weight


def _embedding_scale(decoder: Any, family: Family, dtype: torch.dtype) -> float:
    if not family.embedding_scale:
        return 1.0
    scale = attrgetter(family.embedding_scale)(decoder)
    # Gemma's is a tensor, and rounded to what the embeddings are in, as in training.
    return float(scale.to(dtype)) if isinstance(scale, torch.Tensor) else float(scale)


def _setting(config: Any, name: str, default: float) -> float:
    value = getattr(config, name) if name else None
    return default if value is None else float(value)
