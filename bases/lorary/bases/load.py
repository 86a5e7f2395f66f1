"""Load a base's tokenizer and model, whole or quantized; safetensors only, no remote code."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lorary.errors import ConfigError, CorruptArtifact, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorary.bases.find import Base

Quantization = Literal["none", "int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "nf4")


def default_dtype(device: str) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, else float32."""
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def load_tokenizer(base: Base, *, needs_end: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a padding token.

    Args:
        base: what ``find_base`` returned.
        needs_end: whether there must be an end-of-text token; encoders have none.

    Raises:
        CorruptArtifact: the folder holds no tokenizer that transformers can read, it has no
            end-of-text token, without which no answer could end, or no token to pad with.
    """
    quiet_bitsandbytes()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.path, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError) as error:
        raise CorruptArtifact(f"base '{base.name}' has no readable tokenizer: {error}") from error
    if tokenizer.eos_token_id is None and needs_end:
        raise CorruptArtifact(
            f"the tokenizer of base '{base.name}' has no eos token, so no answer could end. "
            "Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise CorruptArtifact(
            f"the tokenizer of base '{base.name}' has neither a pad nor an eos token, so no batch can "
            "be padded. Set pad_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        # Only ever used where the attention mask is zero, so any existing token serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    base: Base,
    *,
    quantization: Quantization | Mapping[str, Quantization] = "none",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load the causal language model onto ``device``, in eval mode.

    Weights are read, converted and quantized one after the other, so that little more than the result
    is in memory at any time. On a CPU, unquantized and in the dtype of their file, they stay mapped and
    are read when they are first used (``lorary.bases.mapped``).

    Args:
        base: what ``find_base`` returned.
        quantization: ``nf4`` and ``int8`` quantize the linear layers through bitsandbytes; norms
            and embeddings stay in ``dtype``. Or the format of each linear layer by its full name, as
            ``QuantizationPlan.resolve`` returns it; layers that are not named stay whole.
        dtype: of what is not quantized; default ``default_dtype(device)``.
        device: a torch device.
        progress: told how many weights of how many are loaded.
        options: passed to ``from_pretrained`` (``attn_implementation``).

    Raises:
        MissingDependency: quantization without bitsandbytes.
        ConfigError: an unknown quantization or device, one that this device cannot do, a layer that
            is not there, or layers in both int8 and nf4, which bitsandbytes cannot mix.
        CorruptArtifact: not a causal language model that transformers knows.
    """
    quiet_bitsandbytes()
    import torch
    from transformers import AutoModelForCausalLM

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}' was asked for, but torch sees no CUDA device.")
    dtype = default_dtype(device) if dtype is None else dtype
    skipped: list[str] | None = None
    if not isinstance(quantization, str):
        quantization, skipped = _one_format(base, quantization)
    if quantization != "none":
        options["quantization_config"] = _quantizer(quantization, dtype, skipped)
    try:
        with warnings.catch_warnings(), _loading(base.path, progress):
            warnings.filterwarnings("ignore", module="bitsandbytes")
            model = AutoModelForCausalLM.from_pretrained(
                base.path,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
    except (OSError, KeyError, ValueError) as error:
        raise CorruptArtifact(
            f"base '{base.name}' in '{base.path}' cannot be loaded as a causal language model: "
            f"{error}"
        ) from error
    return model.eval()


@contextmanager
def _loading(folder: Path, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Follow transformers through a folder's weights, in the place of its progress bars.

    Freed memory goes back after every weight, and the pages of the mapped files after every few megabytes: what
    has been read is converted.
    """
    from transformers.utils import logging as transformers_logging

    from lorary.bases.mapped import Readings, trim_heap

    readings = Readings(folder.glob("*.safetensors"))

    def follow(bar: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != "Loading weights":
            return bar(*args, **kwargs)
        return weights(list(args[0]))

    def weights(items: list[Any]) -> Iterator[Any]:
        for index, item in enumerate(items):
            yield item
            readings.release_enough()
            trim_heap()
            if progress is not None:
                progress(index + 1, len(items))
        readings.release()

    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    before = transformers_logging.set_tqdm_hook(follow)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)
        if had_bars:
            transformers_logging.enable_progress_bar()


def linear_names(base: Base) -> list[str]:
    """Return the full names of all linear layers but the output head, in the model's order.

    Builds the model without its weights.

    Raises:
        CorruptArtifact: not a causal language model that transformers knows.
    """
    linears, head = _linears(base)
    return [name for name in linears if name != head]


def _linears(base: Base) -> tuple[list[str], str | None]:
    """Return the names of all linear layers, and the output head's."""
    quiet_bitsandbytes()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(
            base.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, KeyError, ValueError) as error:
        raise CorruptArtifact(
            f"base '{base.name}' in '{base.path}' is no causal language model: {error}"
        ) from error
    output = model.get_output_embeddings()
    found = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    return list(found), next((name for name, module in found.items() if module is output), None)


def _one_format(base: Base, formats: Mapping[str, Quantization]) -> tuple[Quantization, list[str]]:
    """Return the one format that bitsandbytes shall make, and patterns of the layers to skip."""
    linears, head = _linears(base)
    unknown = sorted(set(formats) - (set(linears) - {head}))
    if unknown:
        raise ConfigError(
            f"'{unknown[0]}' is to be kept in {formats[unknown[0]]}, but base '{base.name}' has no "
            "such linear layer besides its output head."
        )
    wanted = sorted(set(formats.values()) - {"none"})
    if len(wanted) > 1:
        raise ConfigError(
            f"layers in {' and '.join(wanted)} were asked for, and bitsandbytes quantizes a model to "
            "one format; use one of them beside 'none'."
        )
    # transformers reads them as regular expressions.
    skipped = [re.escape(name) for name in linears if formats.get(name, "none") == "none"]
    return (wanted[0] if wanted else "none"), skipped


def _quantizer(quantization: str, dtype: torch.dtype, skipped: list[str] | None) -> Any:
    """Return the bitsandbytes settings for ``nf4`` (with double quantization) or ``int8``.

    ``skipped`` are patterns of the layers that stay whole; by default transformers skips the head.
    """
    if quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization '{quantization}' is unknown; it is one of {', '.join(QUANTIZATIONS)}."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependency(
            f"quantization '{quantization}' needs bitsandbytes. Run: pip install bitsandbytes, or "
            "use quantization 'none'."
        )
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def quiet_bitsandbytes() -> None:
    """Keep bitsandbytes' warnings out of the log; what fails still raises.

    It says at import that an optional kernel is absent, and at every int8 matrix multiplication
    that activations are rounded to float16. Call before anything imports it (peft does).
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
