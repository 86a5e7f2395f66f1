"""Tiny random checkpoints of encoder and encoder-decoder families, each with a tokenizer of its style."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kind_bases import build_pair

if TYPE_CHECKING:
    from pathlib import Path

WORDS = (
    "the a le cat dog sun sky hat mat film red blue big was on good bad bon chat chien soleil ciel "
    "chapeau tapis rouge bleu grand Paris Anna lives in sees"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BART_SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 66,
    "init_std": 0.2,
    "dropout": 0.0,
}


def build_tokenizer(style: str) -> Any:
    """Train a tokenizer that frames texts as BERT's, RoBERTa's (also BART's) or T5's (also Marian's)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from tokenizers import decoders as undo
    from transformers import PreTrainedTokenizerFast

    unknown = "[UNK]" if style == "bert" else "<unk>"
    specials = {
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        "t5": ["<pad>", "</s>", "<unk>"],
    }[style]
    if style == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = undo.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=specials, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        if style == "roberta":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = undo.ByteLevel()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = undo.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    first, last = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>"), "t5": ("", "</s>")}[
        style
    ]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(),
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (first, last) if t],
    )
    marks: dict[str, Any] = {
        "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "roberta": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
        "t5": {"pad_token": "<pad>", "eos_token": "</s>"},
    }[style]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, model_max_length=64, **marks
    )


def build_family(family: str, folder: Path) -> Path:
    """Save a tiny random checkpoint of ``family``, as it would be published; return its folder."""
    import transformers as t

    if family == "pair":
        build_pair(build_family("bert", folder.with_name("half")), folder)
        return folder
    style = {"bert": "bert", "deberta": "bert", "t5": "t5", "marian": "t5"}.get(family, "roberta")
    tokenizer = build_tokenizer(style)
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model: Any
    if family == "bert":
        model = t.BertForMaskedLM(t.BertConfig(**SIZES, **common))
    elif family == "roberta":
        model = t.RobertaForMaskedLM(t.RobertaConfig(**SIZES, **common))
    elif family == "deberta":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
        model = t.DebertaV2Model(t.DebertaV2Config(**SIZES, **common, **relative))
    elif family == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model = t.T5ForConditionalGeneration(
            t.T5Config(
                **sizes,
                **common,
                initializer_factor=1.0,
                dropout_rate=0.0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        )
    else:
        end = tokenizer.eos_token_id
        config, cls = {
            "bart": (t.BartConfig, t.BartForConditionalGeneration),
            "marian": (t.MarianConfig, t.MarianMTModel),
        }[family]
        marks = {"eos_token_id": end, "forced_eos_token_id": None}
        marks["decoder_start_token_id"] = end if family == "bart" else tokenizer.pad_token_id
        model = cls(config(**BART_SIZES, **common, **marks, bos_token_id=0))
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
